"""The demo's held-out questions, answered by a bundle and by its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from stillgraph.exporter.demo.stories import held_out
from stillgraph.exporter.validate.cases import limit
from stillgraph.exporter.validate.driver import Cache, GraphRun
from stillgraph.manifest import Manifest

QUESTIONS = 300


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
