"""Attention of the portable target: grouped heads by reshaping the query, masks explicit, softmax in fp32.

Shapes: B batch, H query heads, KV key/value heads, G = H / KV, S queries, C keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PART = 1 << 24  # scores that are made at a time where nothing is masked: 64 MB
MASKED = torch.finfo(torch.float32).min  # finite: a padding row that sees nothing stays a number


def additive_mask(seen: Tensor, groups: int) -> Tensor:
    """float32 [B, 1, G * S, C]: 0 where `seen` [B, S, C], else `MASKED`; query rows repeat per group."""
    mask = torch.where(seen, torch.tensor(0.0), torch.tensor(MASKED))[:, None]  # [B, 1, S, C]
    return mask if seen.shape[1] == 1 else torch.cat([mask] * groups, dim=2)


def portable_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, S, D]
    key: Tensor,  # [B, KV, C, D]
    value: Tensor,  # [B, KV, C, D]
    attention_mask: Tensor | None,  # [B, 1, G * S, C], or [B, 1, 1, C] where S is 1; None hides nothing
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`eager_attention_forward` of transformers without expanding keys and values; returns [B, S, H, D]."""
    batch, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    # The heads of a group are neighbors, so folding them into the rows is a reshape and nothing moves.
    query = (query * scaling).reshape(batch, kv_heads, heads // kv_heads * tokens, size)
    if attention_mask is None and (rows := PART // (batch * kv_heads * key.shape[2])) < query.shape[2]:
        # Every query of a tower sees every patch: together their scores may be more than all its weights.
        parts = [_attend(part, key, value, None, softcap) for part in torch.split(query, rows, dim=2)]
        output = torch.cat(parts, dim=2)
    else:
        output = _attend(query, key, value, attention_mask, softcap)
    return output.reshape(batch, heads, tokens, size).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Queries [B, KV, R, D], scaled, over all keys: [B, KV, R, D]."""
    scores = torch.matmul(query, key.transpose(2, 3))  # [B, KV, G * S, C]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value)
