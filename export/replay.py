"""Run a bundle's graphs over a text, teacher-forced, and measure every call against the reference.

Shapes: B rows, S token slots, C cache slots, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from export.cases import ROW_STAGGER, STEPS, Plan, continues, limit, max_len
from export.config import Say
from export.parity import CaseResult, Comparison, cache_error, compare
from export.reference import Reference
from export.session import open_graph
from runtime.manifest import GraphEntry, Manifest
from runtime.spec import past_names, present_names

POISON = 1e4  # far over any key or value, and finite, as a slot left by a former prompt would be


@dataclass
class State:
    """One case on its way: cache buffers [B, KV, C, D] by input name, tokens of each row, measures so far."""

    prompt: int
    steps: int
    start: Literal["prefill", "reference cache"]
    lengths: np.ndarray  # int64 [B]
    cache: dict[str, np.ndarray]
    comparisons: list[Comparison]


class Replay:
    """Runs one plan: all prompts through the prefill, then, with the prefill gone, all decode steps."""

    def __init__(self, bundle: Path, manifest: Manifest, truth: Reference, plan: Plan, say: Say) -> None:
        self.bundle, self.manifest, self.truth, self.plan, self.say = bundle, manifest, truth, plan, say
        self.rows = np.arange(truth.ids.shape[0])
        self.layers = range(len(manifest.model.layers))

    def run(self) -> list[CaseResult]:
        end = limit(self.manifest)
        states = [self.state(prompt, STEPS) for prompt in self.plan.prompts]
        states += [self.state(prompt, end) for prompt in self.plan.walks]
        if (prefill := self.manifest.graph("prefill")) is not None:
            self.say(f"prefill, {len(states)} prompts")
            session = open_graph(self.bundle / prefill.file.path, self.plan.optimised)
            for state in states:
                if state.start == "prefill":
                    self.prefill(session, prefill, state)
            del session
        if (decode := self.manifest.graph("decode")) is not None:
            self.say(f"decode, {sum(min(s.steps, end - s.prompt) for s in states)} steps")
            session = open_graph(self.bundle / decode.file.path, self.plan.optimised)
            for state in states:
                self.decode(session, state, end)
        return [self.result(state) for state in states if state.comparisons]

    def state(self, prompt: int, steps: int) -> State:
        """A case before its first call: slots poisoned, or the reference's cache where no prefill serves."""
        lengths = np.maximum(1, prompt - self.rows * ROW_STAGGER)
        graph = self.manifest.graph("decode") or self.manifest.graph("prefill")
        assert graph is not None
        shape = (len(self.rows), self.manifest.model.num_key_value_heads, graph.shape.capacity)
        shape += (self.manifest.model.head_dim,)  # type: ignore[assignment]
        cache = {
            name: np.full(shape, POISON, np.float32) for layer in self.layers for name in past_names(layer)
        }
        slots = max_len(self.manifest)
        if slots is not None and (prompt <= slots or continues(self.manifest)):
            return State(prompt, steps, "prefill", lengths, cache, [])
        for layer in self.layers:
            for name, block in zip(past_names(layer), self.block(layer), strict=True):
                fill(cache[name], block, lengths)
        return State(prompt, steps, "reference cache", lengths, cache, [])

    def block(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        return self.truth.keys[layer], self.truth.values[layer]

    def prefill(self, session: ort.InferenceSession, graph: GraphEntry, state: State) -> None:
        """Feed the prompt in chunks; a row that is through repeats its last token, which changes nothing."""
        slots = graph.shape.slots
        for start in range(0, int(state.lengths.max()), slots):
            past = np.minimum(start, state.lengths - 1)
            count = np.minimum(slots, state.lengths - past)
            ids = np.full((len(self.rows), slots), self.manifest.tokens.pad or 0, np.int64)
            for row in self.rows:
                ids[row, : count[row]] = self.truth.ids[row, past[row] : past[row] + count[row]]
            feeds = {"input_ids": ids, "prompt_length": count}
            if graph.shape.ctx is not None:
                feeds |= {"past_length": past, **state.cache}
            logits = self.call(session, feeds, state)
        self.measure(state, logits)

    def decode(self, session: ort.InferenceSession, state: State, end: int) -> None:
        for _ in range(state.steps):
            if state.lengths.max() >= end:
                return
            feeds = {
                "input_ids": self.truth.ids[self.rows, state.lengths][:, None],
                "past_length": state.lengths,
            }
            logits = self.call(session, feeds | state.cache, state)
            state.lengths = state.lengths + 1
            self.measure(state, logits)

    def call(self, session: ort.InferenceSession, feeds: dict[str, np.ndarray], state: State) -> np.ndarray:
        """Run a graph and put what it returns where its valid tokens are into the state's cache."""
        logits, *present = session.run(None, feeds)
        names = [name for layer in self.layers for name in past_names(layer)]
        outputs = [name for layer in self.layers for name in present_names(layer)]
        assert [output.name for output in session.get_outputs()[1:]] == outputs
        for name, block in zip(names, present, strict=True):
            if block.shape == state.cache[name].shape:
                state.cache[name] = block
                continue
            fill(state.cache[name], block, state.lengths)  # a prefill without a cache: to the front
        result: np.ndarray = logits
        return result

    def measure(self, state: State, logits: np.ndarray) -> None:
        for row in self.rows:
            position = int(state.lengths[row]) - 1
            truth = self.truth.logits[position][row]
            state.comparisons.append(compare(int(row), position, truth, logits[row, 0]))

    def result(self, state: State) -> CaseResult:
        return CaseResult(
            text=self.plan.text,
            optimised=self.plan.optimised,
            start=state.start,
            prompt=state.prompt,
            comparisons=tuple(state.comparisons),
            cache_errors=tuple(self.cache_error(state, layer) for layer in self.layers),
        )

    def cache_error(self, state: State, layer: int) -> float:
        """The worse of keys and values of a layer, over the valid slots of every row."""
        errors = []
        for name, block in zip(past_names(layer), self.block(layer), strict=True):
            for row, length in enumerate(state.lengths):
                errors.append(cache_error(block[row, :, :length], state.cache[name][row, :, :length]))
        return max(errors)


def fill(buffer: np.ndarray, block: np.ndarray, lengths: np.ndarray) -> None:
    """Copy each row's first `lengths` [B] slots of `block` [B, KV, S, D] into `buffer` [B, KV, C, D]."""
    for row, length in enumerate(lengths):
        buffer[row, :, :length] = block[row, :, :length]
