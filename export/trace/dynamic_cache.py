"""The growing key/value cache: every call puts its tokens behind those that are there.

Shapes: B batch, S new tokens, T past tokens, KV key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class GrowingCache:
    """What a model calls `past_key_values`, over keys and values as long as the text. Not a
    `transformers.Cache`.

    `present[i]` holds layer i's (key, value) [B, KV, T + S, D] after its `update`. Sliding layers keep every
    token too, and see their window by mask: one rule of what is visible serves all graphs.
    """

    def __init__(self, past: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Append layer `layer_idx`'s new keys and values [B, KV, S, D]; return all it may attend to."""
        past_key, past_value = self.past[layer_idx]
        pair = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        self.present[layer_idx] = pair
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache before this call, T; a symbol while a graph is traced."""
        return self.past[layer_idx][0].shape[2]
