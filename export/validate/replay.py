"""Run a bundle's graphs over a text, teacher-forced, and measure every call against the reference.

Shapes: B rows, S tokens, C cache slots, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from stillgraph.exporter.config import Say
from stillgraph.exporter.validate import image
from stillgraph.exporter.validate.cases import ROW_STAGGER, STEPS, ValidationPlan, continues, limit, max_len
from stillgraph.exporter.validate.driver import Cache, GraphRun
from stillgraph.exporter.validate.gates import Gate
from stillgraph.exporter.validate.measures import CaseMeasures
from stillgraph.exporter.validate.reference import Reference
from stillgraph.exporter.validate.report import CaseResult
from stillgraph.exporter.validate.written import WrittenRun
from stillgraph.manifest import Manifest
from stillgraph.ports import PortRole


@dataclass
class State:
    """One case on its way: the cache, tokens of each row, measures so far."""

    prompt: int
    steps: int
    start: Literal["prefill", "reference cache"]
    lengths: np.ndarray  # int64 [B]
    cache: Cache
    measures: CaseMeasures


class Replay:
    """Runs one plan: all prompts through the prefill, then, with the prefill gone, all decode steps."""

    def __init__(
        self, bundle: Path, manifest: Manifest, truth: Reference, plan: ValidationPlan, gate: Gate, say: Say
    ) -> None:
        self.manifest, self.truth, self.plan, self.gate, self.say = manifest, truth, plan, gate, say
        seen = image.features(bundle, manifest, plan.optimized) if plan.text == "picture" else None
        self.seen = seen
        kind = WrittenRun if plan.as_written else GraphRun
        self.graphs = kind(bundle, manifest, plan.optimized, seen)
        self.rows, self.layers = self.graphs.rows, self.graphs.layers

    def run(self) -> list[CaseResult]:
        end = limit(self.manifest)
        states = [self.state(prompt, STEPS) for prompt in self.plan.prompts]
        states += [self.state(prompt, end) for prompt in self.plan.walks]
        if self.manifest.graph("prefill") is not None:
            self.say(f"prefill, {len(states)} prompts")
            for state in states:
                if state.start == "prefill":
                    self.measure(state, self.graphs.prefill(state.cache, self.truth.ids, state.lengths))
        if self.manifest.graph("decode") is not None:
            self.say(f"decode, {sum(min(s.steps, end - s.prompt) for s in states)} steps")
            for state in states:
                self.decode(state, end)
        return [self.result(state) for state in states if state.measures.comparisons]

    def state(self, prompt: int, steps: int) -> State:
        """A case before its first call: slots poisoned, or the reference's cache where no prefill serves."""
        lengths = np.maximum(1, prompt - self.rows * ROW_STAGGER)
        cache = self.graphs.new_cache()
        chunk = max_len(self.manifest)
        if chunk is not None and (prompt <= chunk or continues(self.manifest)):
            return State(prompt, steps, "prefill", lengths, cache, CaseMeasures(self.truth))
        for layer in self.layers:
            for role, block in self.blocks(layer).items():
                for row, length in enumerate(lengths):
                    first = self.graphs.first_position(layer, length)
                    cache[layer, role][row, :, : length - first] = block[row, :, first:length]
        return State(prompt, steps, "reference cache", lengths, cache, CaseMeasures(self.truth))

    def blocks(self, layer: int) -> dict[PortRole, np.ndarray]:
        return {"key": self.truth.keys[layer], "value": self.truth.values[layer]}

    def decode(self, state: State, end: int) -> None:
        for _ in range(state.steps):
            if state.lengths.max() >= end:
                return
            logits = self.graphs.decode(state.cache, self.truth.ids[self.rows, state.lengths], state.lengths)
            state.lengths = state.lengths + 1
            self.measure(state, logits)

    def measure(self, state: State, logits: np.ndarray) -> None:
        for row in self.rows:
            state.measures.logits(int(row), int(state.lengths[row]) - 1, logits[row])

    def result(self, state: State) -> CaseResult:
        measures = state.measures
        for layer in self.layers:
            for row, length in enumerate(state.lengths):
                first = self.graphs.first_position(layer, length)
                keys, values = (
                    state.cache[layer, role][row, :, : length - first] for role in ("key", "value")
                )
                measures.slots(layer, row, first, keys, values)
        measures.features(self.seen)
        return CaseResult(
            text=self.plan.text,
            optimized=self.plan.optimized,
            start=state.start,
            prompt=state.prompt,
            comparisons=tuple(measures.comparisons),
            cache_errors=measures.cache_errors,
            checks=self.gate.checks(measures.measured()),
            feature_error=measures.feature_error,
            as_written=self.plan.as_written,
            int8_activations=any(graph.shape.int8_activations for graph in self.manifest.graphs.values()),
        )
