"""What graphs make of real text, against PyTorch with the checkpoint's own weights: the error of everything.

Counted as llama.cpp does: a text is cut into chunks, the first half of each is given as a prompt, and the
positions of the second half count. Shapes: B rows, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from stillgraph.exporter.precisions import PRECISIONS
from stillgraph.exporter.validate.cases import continues, max_len
from stillgraph.exporter.validate.chunks import Chunks
from stillgraph.exporter.validate.divergences import summarize
from stillgraph.exporter.validate.driver import Cache, GraphRun
from stillgraph.exporter.validate.kinds import LayerNoise, TextStatistics
from stillgraph.exporter.validate.metrics import Divergence, diverge
from stillgraph.exporter.validate.reference import Reference, reference
from stillgraph.manifest import Manifest, Quality


@dataclass(frozen=True)
class Original:
    """PyTorch with the checkpoint's own weights over one batch of a text's chunks; rows: those that count."""

    chunks: Chunks
    truth: Reference
    rows: int

    @property
    def first(self) -> int:
        """The first position that counts."""
        return int(self.truth.ids.shape[1]) // 2


def originals(model: PreTrainedModel, texts: Sequence[Chunks], rows: int, folder: Path) -> list[Original]:
    """PyTorch's passes; logits are kept in files of `folder`."""
    found = list[Original]()
    for chunks in texts:
        size = chunks.ids.shape[1]
        counted = set(range(size // 2, size - 1))
        for ids, count in chunks.batches(rows):
            spool = folder / f"{len(found)}.logits"
            found.append(Original(chunks, reference(model, ids, counted, spool=spool), count))
    return found


@dataclass
class TextRun:
    """One kind of a bundle's graphs over the texts, as `originals` has them."""

    divergences: dict[str, list[Divergence]] = field(default_factory=dict)  # by hash of the text
    signal: dict[tuple[int, str], float] = field(default_factory=dict)  # sums of squares by layer and kind
    noise: dict[tuple[int, str], float] = field(default_factory=dict)

    @property
    def all_divergences(self) -> list[Divergence]:
        return [one for found in self.divergences.values() for one in found]

    def statistics(self, texts: Sequence[Chunks]) -> tuple[TextStatistics, ...]:
        return tuple(
            TextStatistics(
                text=chunks.name,
                sha256=chunks.sha256,
                chunk=chunks.ids.shape[1],
                chunks=len(chunks.ids),
                statistics=summarize(self.divergences[chunks.sha256]),
            )
            for chunks in texts
        )

    def layers(self) -> tuple[LayerNoise, ...]:
        def decibels(layer: int, kind: Literal["key", "value"]) -> float:
            noise = self.noise[layer, kind]
            return math.inf if noise == 0 else 10 * float(np.log10(self.signal[layer, kind] / noise))

        layers = sorted({layer for layer, _ in self.signal})
        return tuple(
            LayerNoise(layer=layer, keys=decibels(layer, "key"), values=decibels(layer, "value"))
            for layer in layers
        )


def run_texts(bundle: Path, manifest: Manifest, given: Sequence[Original]) -> TextRun:
    """Every batch through a bundle's graphs as a runtime runs them: prefill to the half, then token by token.

    manifest: with one prefill.
    """
    graphs, found = GraphRun(bundle, manifest, optimized=True), TextRun()
    # All prompts before all steps: one graph is in memory at a time.
    begun = [_begin(graphs, manifest, one) for one in given]
    for one, (cache, length, logits) in zip(given, begun, strict=True):
        into = found.divergences.setdefault(one.chunks.sha256, [])
        ids, end = one.truth.ids, one.truth.ids.shape[1] - 1
        while True:
            if length > one.first:
                into += [
                    diverge(one.truth.logits[length - 1][row], logits[row], int(ids[row, length]))
                    for row in range(one.rows)
                ]
            if length == end:
                break
            logits = graphs.decode(cache, ids[:, length], np.full(len(ids), length))
            length += 1
        _add_noise(graphs, found, one, cache, length)
        cache.clear()
    return found


def _begin(graphs: GraphRun, manifest: Manifest, one: Original) -> tuple[Cache, int, np.ndarray]:
    """The cache after the prompt, its length, and the logits of its last token."""
    most = one.first + 1 if continues(manifest) else min(one.first + 1, max_len(manifest) or 1)
    cache = graphs.new_cache()
    return cache, most, graphs.prefill(cache, one.truth.ids, np.full(len(one.truth.ids), most))


def _add_noise(graphs: GraphRun, run: TextRun, one: Original, cache: Cache, length: int) -> None:
    """Squares of the keys and values in the cache, and of their differences from PyTorch's."""
    for (layer, role), block in cache.items():
        first = graphs.first_position(layer, length)
        blocks = one.truth.keys if role == "key" else one.truth.values
        truth = blocks[layer][: one.rows, :, first:length].astype(np.float64)
        error = block[: one.rows, :, : length - first] - truth
        for sums, values in ((run.signal, truth), (run.noise, error)):
            sums[layer, role] = sums.get((layer, role), 0.0) + float(np.square(values).sum())


def cost(manifest: Manifest, run: TextRun, text: bool, recalled: tuple[float, float] | None) -> Quality:
    """What quantized weights cost over all texts; recalled: of the bundle and of the checkpoint."""
    traits, all_of_it = PRECISIONS[manifest.precision], summarize(run.all_divergences)
    return Quality(
        text=text,
        positions=all_of_it.positions,
        kl=all_of_it.kl.value,
        top1_agreement=all_of_it.same_top.value,
        perplexity=all_of_it.perplexity.value,
        original_perplexity=all_of_it.original_perplexity.value,
        ratio_error=all_of_it.ratio.error,
        recall=recalled and recalled[0],
        original_recall=recalled and recalled[1],
        kl_bound=traits.max_kl,
        perplexity_bound=traits.max_perplexity,
    )
