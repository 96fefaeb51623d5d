"""Run a bundle's growing graph over a text, teacher-forced, and measure every call against the reference.

Shapes: N tokens, S tokens of a call, T tokens before it, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillgraph.exporter.config import Say
from stillgraph.exporter.ort import DTYPES, open_graph
from stillgraph.exporter.validate.cases import STEPS, ValidationPlan, limit
from stillgraph.exporter.validate.metrics import Comparison, cache_error, compare
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
        self, bundle: Path, manifest: Manifest, truth: Reference, plan: ValidationPlan, bound: float, say: Say
    ) -> None:
        entry = manifest.graph("dynamic")
        assert entry is not None
        self.entry: GraphEntry = entry
        self.truth, self.plan, self.bound, self.say = truth, plan, bound, say
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
        comparisons: list[Comparison] = []
        for stop in stops:
            ids = self.truth.ids[:, start:stop]
            logits, *present = self.session.run(None, {self.entry.input("token_ids").name: ids, **cache})
            cache = dict(zip(cache, present, strict=True))
            if stop >= prompt:
                comparisons.append(compare(0, stop - 1, self.truth.logits[stop - 1][0], logits[0, 0]))
            start = stop
        return CaseResult(
            text=self.plan.text,
            optimized=self.plan.optimized,
            start="prefill",
            bound=self.bound,
            prompt=prompt,
            comparisons=tuple(comparisons),
            cache_errors=self.cache_errors(list(cache.values()), start),
        )

    def nothing(self) -> dict[str, np.ndarray]:
        """Keys and values [1, KV, 0, D] of no token, by input."""
        types = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        pasts = [port for port in self.entry.inputs if port.is_cache]
        return {port.name: np.zeros(port.at({PAST: 0}), types[port.name]) for port in pasts}

    def cache_errors(self, cache: list[np.ndarray], length: int) -> tuple[float, ...]:
        """Per layer, the worse of its keys and values after `length` tokens."""
        truth = zip(self.truth.keys, self.truth.values, strict=True)
        return tuple(
            max(cache_error(block[:, :, :length], found) for block, found in zip(pair, held, strict=True))
            for pair, held in zip(truth, zip(cache[::2], cache[1::2], strict=True), strict=True)
        )
