"""Run a bundle's growing graph over a text, teacher-forced, and measure every call against the reference.

Shapes: N tokens, S tokens of a call, T tokens before it, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

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


class GrowingReplay:
    """Runs one plan as `replay.Replay` does for static graphs, with lengths for fixed sizes.

    Every prompt goes in at once, and again in two calls, as a prompt does that continues a chat; both are
    followed by a few tokens, one a call.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, truth: Reference, plan: ValidationPlan, gate: Gate, say: Say
    ) -> None:
        entry = manifest.graph("dynamic")
        assert entry is not None
        self.entry: GraphEntry = entry
        self.truth, self.plan, self.gate, self.say = truth, plan, gate, say
        self.end = limit(manifest)
        self.session = open_graph(bundle / entry.file.path, plan.optimized)

    def run(self) -> list[CaseResult]:
        self.say(f"dynamic, {len(self.plan.prompts)} prompts")
        cuts = [(prompt, cut) for prompt in self.plan.prompts for cut in {0, prompt // 2}]
        return [self.case(prompt, cut) for prompt, cut in sorted(cuts)]

    def case(self, prompt: int, cut: int) -> CaseResult:
        """A prompt, its first `cut` tokens in a call of their own, and the steps after it."""
        stops = [cut] if cut else []
        stops += range(prompt, min(prompt + STEPS, self.end) + 1)
        cache, start = self.nothing(), 0
        measures = CaseMeasures(self.truth)
        for stop in stops:
            ids = self.truth.ids[:, start:stop]
            logits, *present = self.session.run(None, {self.entry.input("token_ids").name: ids, **cache})
            cache = dict(zip(cache, present, strict=True))
            if stop >= prompt:
                measures.logits(0, stop - 1, logits[0, 0])
            start = stop
        held = list(cache.values())
        for layer, (keys, values) in enumerate(zip(held[::2], held[1::2], strict=True)):
            measures.slots(layer, 0, 0, keys[0], values[0])
        return CaseResult(
            text=self.plan.text,
            optimized=self.plan.optimized,
            start="prefill",
            prompt=prompt,
            comparisons=tuple(measures.comparisons),
            cache_errors=measures.cache_errors,
            checks=self.gate.checks(measures.measured()),
        )

    def nothing(self) -> dict[str, np.ndarray]:
        """Keys and values [1, KV, 0, D] of no token, by input."""
        types = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        pasts = [port for port in self.entry.inputs if port.is_cache]
        return {port.name: np.zeros(port.at({PAST: 0}), types[port.name]) for port in pasts}
