"""What quantized weights cost, from divergences at many positions and the demo's questions.

Not the graph's error: that is measured against PyTorch with the same quantized weights
(`stillgraph.exporter.validate.report`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from stillgraph.exporter.demo.stories import held_out
from stillgraph.exporter.precisions import PRECISIONS
from stillgraph.exporter.validate.cases import limit, max_len
from stillgraph.exporter.validate.driver import Cache, GraphRun
from stillgraph.exporter.validate.metrics import Divergence, diverge
from stillgraph.exporter.validate.reference import Reference
from stillgraph.manifest import Manifest, Precision, Quality

QUESTIONS = 100


def summarize(
    precision: Precision, divergences: Sequence[Divergence], text: bool, recall: tuple[float, float] | None
) -> Quality:
    """Means over positions; text: whether the ids are one; recall: of the bundle and of the checkpoint."""
    traits = PRECISIONS[precision]
    return Quality(
        text=text,
        positions=len(divergences),
        kl=float(np.mean([divergence.kl for divergence in divergences])),
        top1_agreement=float(np.mean([divergence.top1_equal for divergence in divergences])),
        perplexity=perplexity(divergence.nll for divergence in divergences),
        original_perplexity=perplexity(divergence.original_nll for divergence in divergences),
        recall=recall and recall[0],
        original_recall=recall and recall[1],
        kl_bound=traits.max_kl,
        perplexity_bound=traits.max_perplexity,
    )


def perplexity(losses: Iterable[float | None]) -> float:
    """exp of the mean negative log-likelihood in nats; None has no next token."""
    return math.exp(float(np.mean([loss for loss in losses if loss is not None])))


def walk(bundle: Path, manifest: Manifest, original: Reference, end: int) -> list[Divergence]:
    """How a text's logits diverge: a prompt of as much as the prefill takes, then token by token to `end`.

    original: of the checkpoint's own weights, over the ids [B, N], logits at every position before `end`.
    """
    graphs = GraphRun(bundle, manifest, optimized=True)
    ids, found = original.ids, list[Divergence]()
    cache, lengths = graphs.new_cache(), np.full(len(graphs.rows), min(max_len(manifest) or 1, end))
    logits = graphs.prefill(cache, ids, lengths)
    while True:
        for row in graphs.rows:
            position = int(lengths[row]) - 1
            token = int(ids[row, position + 1]) if position + 1 < ids.shape[1] else None
            found.append(diverge(original.logits[position][row], logits[row], token))
        if int(lengths[0]) == end:
            return found
        logits = graphs.decode(cache, ids[graphs.rows, lengths], lengths)
        lengths = lengths + 1


def walked(manifest: Manifest, end: int) -> set[int]:
    """The positions that a walk compares."""
    return set(range(min(max_len(manifest) or 1, end) - 1, end))


def recall(bundle: Path, manifest: Manifest, model: PreTrainedModel) -> tuple[float, float]:
    """Share of the demo's held-out questions that the bundle and the checkpoint answer word for word."""
    from stillgraph.exporter.demo.train_text import Recall, right

    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    far, room = max(manifest.model.windows, default=0), limit(manifest)
    told = (Recall.of(story, tokenizer) for story in held_out(seed=0))
    asked = list(islice((r for r in told if r.distance > far and len(r.ids) <= room), QUESTIONS))
    graphs = GraphRun(bundle, manifest, optimized=True)
    # All prompts before all answers: one graph is in memory at a time.
    begun = [_prompted(graphs, question.ids, question.start) for question in asked]
    found = [_answers(graphs, *start, q.ids, q.start) for start, q in zip(begun, asked, strict=True)]
    model.set_attn_implementation("sdpa")  # eager attention has no masks of bool
    original = [right(model, question) for question in asked]
    return float(np.mean(found)), float(np.mean(original))


def _prompted(graphs: GraphRun, ids: Sequence[int], start: int) -> tuple[Cache, int]:
    """The cache of a prompt, the same in every row, and the best token after it."""
    cache, rows = graphs.new_cache(), len(graphs.rows)
    logits = graphs.prefill(cache, np.tile(np.array(ids), (rows, 1)), np.full(rows, start))
    return cache, int(logits[0].argmax())


def _answers(graphs: GraphRun, cache: Cache, best: int, ids: Sequence[int], start: int) -> bool:
    """Whether greedy decoding gives ids from `start` on: each of them is the best after those before."""
    rows = len(graphs.rows)
    for position in range(start, len(ids)):
        if best != ids[position]:
            return False
        if position + 1 < len(ids):
            logits = graphs.decode(cache, np.full(rows, ids[position]), np.full(rows, position))
            best = int(logits[0].argmax())
    return True
