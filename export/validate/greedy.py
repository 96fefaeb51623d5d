"""Greedy continuations of passages: where a graph's first token is another than PyTorch's.

Shapes: B rows, n prompts, P tokens of a prompt, T of its continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from stillgraph.exporter.validate.cases import continues, limit, max_len
from stillgraph.exporter.validate.chunks import Chunks
from stillgraph.exporter.validate.driver import GraphRun
from stillgraph.exporter.validate.kinds import FirstDifferences
from stillgraph.manifest import Manifest

PROMPTS = 50
PROMPT = 32  # tokens
TOKENS = 256  # at most, of a continuation


@dataclass(frozen=True)
class Continuations:
    """PyTorch's: prompts int64 [n, P] and the tokens after them [n, T], stop tokens among them."""

    prompts: np.ndarray
    tokens: np.ndarray


def passages(manifest: Manifest, texts: Sequence[Chunks]) -> np.ndarray:
    """Prompts int64 [n, P] from places at equal distances in the chunks of all texts; none twice."""
    most = min(PROMPT, limit(manifest) // 2)
    if not continues(manifest):
        most = min(most, max_len(manifest) or 1)
    places = [(chunk, start) for text in texts for chunk in text.ids
              for start in range(0, len(chunk) - most + 1, max(1, most // 4))]  # fmt: skip
    chosen = np.linspace(0, len(places) - 1, min(PROMPTS, len(places))).astype(int)
    prompts = np.stack([places[index][0][places[index][1] :][:most] for index in chosen])
    tokens = manifest.calling.tokens
    if tokens.tokenizer_adds_bos and tokens.bos is not None:
        prompts[:, 0] = tokens.bos
    return prompts


@torch.no_grad()
def continued(model: Any, manifest: Manifest, prompts: np.ndarray) -> Continuations:
    """What PyTorch says after each prompt, greedily, all prompts at once."""
    count = min(TOKENS, limit(manifest) - prompts.shape[1])
    cache, step, found = DynamicCache(), torch.from_numpy(prompts), list[torch.Tensor]()
    for _ in range(count):
        logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits.argmax(-1)  # [n, 1]
        found.append(step)
    return Continuations(prompts, torch.cat(found, 1).numpy())


def first_differences(bundle: Path, manifest: Manifest, truth: Continuations) -> FirstDifferences:
    """Follow PyTorch's continuations until a graph's best token is another, which is where it leaves them."""
    graphs = GraphRun(bundle, manifest, optimized=True)
    rows, (count, prompt) = len(graphs.rows), truth.prompts.shape
    groups = [np.arange(start, start + rows).clip(max=count - 1) for start in range(0, count, rows)]
    begun = []
    for group in groups:
        cache = graphs.new_cache()
        begun.append((cache, graphs.prefill(cache, truth.prompts[group], np.full(rows, prompt))))
    found: dict[int, int | None] = {}
    for group, (cache, logits) in zip(groups, begun, strict=True):
        first: list[int | None] = [None] * rows
        for index in range(truth.tokens.shape[1]):
            given = truth.tokens[group, index]
            for row in np.flatnonzero(logits.argmax(-1) != given):
                first[row] = index if first[row] is None else first[row]
            if None not in first or index + 1 == truth.tokens.shape[1]:
                break
            logits = graphs.decode(cache, given, np.full(rows, prompt + index))
        found |= dict(zip(group.tolist(), first, strict=True))
        cache.clear()
    return FirstDifferences(
        prompt=prompt, tokens=truth.tokens.shape[1], first=tuple(found[index] for index in range(count))
    )
