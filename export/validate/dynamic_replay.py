"""Run a growing graph over a text, teacher-forced, and measure every call against the reference.

Shapes: N tokens, S tokens of a call, T tokens before it, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from stillgraph.exporter.config import Say
from stillgraph.exporter.ort import DTYPES, open_graph
from stillgraph.exporter.validate.cases import STEPS, ValidationPlan, limit
from stillgraph.exporter.validate.gates import Gate
from stillgraph.exporter.validate.measures import CaseMeasures
from stillgraph.exporter.validate.reference import Reference
from stillgraph.exporter.validate.report import CaseResult
from stillgraph.manifest import GraphEntry, Manifest
from stillgraph.ports import PAST

TWO_CALLS = "in two calls"
Held = tuple[int, int, np.ndarray, np.ndarray]  # a layer, the first position, keys and values [KV, n, D]


class GrowingDecoder(Protocol):
    """What takes any number of tokens of one row after those that it holds: our graph, or another's."""

    def reset(self) -> None:
        """Hold no tokens."""

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """Take ids [1, S] behind what is held; logits [V] after the last."""

    def held(self) -> Iterator[Held]:
        """Keys and values of what is held; of no layer where they are not to be compared."""


class GrowingReplay:
    """Runs one plan as `replay.Replay` does for static graphs, with lengths for fixed sizes.

    Every prompt goes in at once, and again in two calls, as a prompt does that continues a chat; both are
    followed by a few tokens, one a call. end: tokens of a text at most; given: how the decoder is driven, in
    words for the report.
    """

    def __init__(
        self,
        decoder: GrowingDecoder,
        end: int,
        truth: Reference,
        plan: ValidationPlan,
        gate: Gate,
        given: str = "",
    ) -> None:
        self.decoder, self.end, self.given = decoder, end, given
        self.truth, self.plan, self.gate = truth, plan, gate

    def run(self) -> list[CaseResult]:
        cuts = [(prompt, cut) for prompt in self.plan.prompts for cut in {0, prompt // 2}]
        return [self.case(prompt, cut) for prompt, cut in sorted(cuts)]

    def case(self, prompt: int, cut: int) -> CaseResult:
        """A prompt, its first `cut` tokens in a call of their own, and the steps after it."""
        stops = [cut] if cut else []
        stops += range(prompt, min(prompt + STEPS, self.end) + 1)
        self.decoder.reset()
        start, measures = 0, CaseMeasures(self.truth)
        for stop in stops:
            logits = self.decoder.feed(self.truth.ids[:, start:stop])
            if stop >= prompt:
                measures.logits(0, stop - 1, logits)
            start = stop
        for layer, first, keys, values in self.decoder.held():
            measures.slots(layer, 0, first, keys, values)
        return CaseResult(
            text=self.plan.text,
            optimized=self.plan.optimized,
            start="prefill",
            prompt=prompt,
            comparisons=tuple(measures.comparisons),
            cache_errors=measures.cache_errors,
            checks=self.gate.checks(measures.measured()),
            given=" ".join(part for part in (self.given, TWO_CALLS if cut else "") if part),
        )


class DynamicGraph:
    """A bundle's own growing graph."""

    def __init__(self, bundle: Path, entry: GraphEntry, optimized: bool) -> None:
        self.entry, self.session = entry, open_graph(bundle / entry.file.path, optimized)
        self.cache: dict[str, np.ndarray] = {}

    def reset(self) -> None:
        types = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        pasts = [port for port in self.entry.inputs if port.is_cache]
        self.cache = {port.name: np.zeros(port.at({PAST: 0}), types[port.name]) for port in pasts}

    def feed(self, ids: np.ndarray) -> np.ndarray:
        logits, *present = self.session.run(None, {self.entry.input("token_ids").name: ids, **self.cache})
        self.cache = dict(zip(self.cache, present, strict=True))
        last: np.ndarray = logits[0, 0]
        return last

    def held(self) -> Iterator[Held]:
        blocks = list(self.cache.values())
        for layer, (keys, values) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
            yield layer, 0, keys[0], values[0]


def dynamic_replay(
    bundle: Path, manifest: Manifest, truth: Reference, plan: ValidationPlan, gate: Gate, say: Say
) -> GrowingReplay:
    """Of a bundle's growing graph."""
    entry = manifest.graph("dynamic")
    assert entry is not None
    say(f"dynamic, {len(plan.prompts)} prompts")
    return GrowingReplay(DynamicGraph(bundle, entry, plan.optimized), limit(manifest), truth, plan, gate)
