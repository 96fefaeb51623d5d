"""What PyTorch computes: logits, keys and values at every position of a text, from one pass.

A decoder is causal, so the logits after n tokens of a text are the same however the text is cut into prompt
and steps. One pass with a growing cache therefore serves every case of a validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

CHUNK = 128  # tokens a step of the reference pass, so that logits of a long text are never all in memory


@dataclass(frozen=True)
class Reference:
    """The reference of one text. Shapes: B rows, N tokens, L layers, KV key/value heads, D head size.

    ids: int64 [B, N]; logits: position to float32 [B, V], for the positions asked for; keys and values: one
    float32 [B, KV, N, D] a layer.
    """

    ids: np.ndarray
    logits: dict[int, np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]


@torch.no_grad()
def reference(model: torch.nn.Module, ids: np.ndarray, positions: set[int]) -> Reference:
    """Run the original model over `ids` [B, N]; keep the logits at `positions`."""
    # Without a config every layer keeps all keys; the sliding layers still see only their window, by mask.
    cache = DynamicCache()
    logits: dict[int, np.ndarray] = {}
    for start in range(0, ids.shape[1], CHUNK):
        chunk = torch.from_numpy(ids[:, start : start + CHUNK])
        wanted = sorted(positions & set(range(start, start + chunk.shape[1])))
        kept = torch.tensor(wanted or [start]) - start  # the head is most of a small model's work
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=kept).logits
        for index, position in enumerate(wanted):
            logits[position] = output[:, index].float().numpy().copy()
    keys = [layer.keys.numpy() for layer in cache.layers]
    values = [layer.values.numpy() for layer in cache.layers]
    return Reference(ids, logits, keys, values)
