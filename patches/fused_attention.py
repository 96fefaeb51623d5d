"""Attention as one product for q, k, v (`side_by_side`) and one op for RoPE, cache, mask and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of
from stillgraph.patches.side_by_side import side_by_side

SIGNATURE = (
    "self",
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "past_key_values",
    "kwargs",
)


def _projected(self: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """Queries [B, S, H * D], keys and values [B, S, KV * D], of one product where they are alike."""
    if hasattr(self, "qkv_proj"):
        product, queries = self.qkv_proj(hidden), self.o_proj.weight.shape[1]
        others = (product.shape[-1] - queries) // 2
        return torch.split(product, [queries, others, others], dim=-1)
    return tuple(side_by_side(hidden, (self.q_proj, self.k_proj, self.v_proj)))


def _normed(norm: Any, heads: Tensor, shifted: bool) -> Tensor:
    """A norm over each head of [B, S, heads * D], or over all, as one op that needs no other shape for it."""
    normed: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::BranchwiseRMSNorm",
        [heads, 1.0 + norm.weight.float() if shifted else norm.weight],
        attrs={
            "num_branches": heads.shape[-1] // norm.weight.shape[0],
            "epsilon": norm.eps if shifted else norm.variance_epsilon,
        },
        dtype=heads.dtype,
        shape=heads.shape,
        version=1,
    )
    return normed


def fused_attention(
    owner: type,
    shifted: bool = False,
    softcap: str | None = None,
    rotates: str | None = None,
    scale: Callable[[Any, Tensor], Tensor] | None = None,
) -> Patch:
    """Of a class with `q_proj`, `k_proj` and `v_proj`, or `qkv_proj`, and `o_proj`.

    shifted: its `q_norm` and `k_norm`, where it has them, scale by 1 + weight; softcap: its attribute with
    the cap of the scores, a number or None; rotates: its attribute that is true in layers with RoPE, where
    there are others; scale(the module, positions [B, S]): what queries are multiplied by, [B, S, 1], where it
    takes `position_ids` for that.
    """

    def forward(
        self: Any,
        hidden_states: Tensor,  # [B, S, hidden]
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Over a cache that attends by itself; positions and masks are its."""
        query, key, value = _projected(self, hidden_states)
        if hasattr(self, "q_norm"):
            query, key = _normed(self.q_norm, query, shifted), _normed(self.k_norm, key, shifted)
        if scale is not None:  # RoPE rotates after it, and a number is the same before it
            query = query * scale(self, kwargs["position_ids"])
        cap = None if softcap is None else getattr(self, softcap)
        rope = rotates is None or bool(getattr(self, rotates))
        output = past_key_values.attend(query, key, value, self, softcap=cap, rope=rope)
        return self.o_proj(output), None

    return Patch(
        name=f"fused_attention of {owner.__name__}",
        target=forward_of(owner),
        signature=SIGNATURE if scale is None else (*SIGNATURE[:4], "position_ids", *SIGNATURE[4:]),
        replacement=forward,
        reason="a token's time is reading weights: one product reads them at once, and one op moves no cache",
        upstream="https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md",
        remove_when="transformers' attention interface hands over queries and keys before RoPE",
    )
