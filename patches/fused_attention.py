"""Attention as one product for q, k, v and one op for RoPE, cache, mask and softmax."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillgraph.patches.patch import Patch


def forward(
    self: Any,
    hidden_states: Tensor,  # [B, S, hidden]
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`forward` of a decoder's attention over a cache that attends by itself; positions and masks are its.

    Queries and keys are normalized where the model has norms for them. The concatenation of weights is
    theirs alone, so it is done once, when the weights are written.
    """
    projections = (self.q_proj, self.k_proj, self.v_proj)
    weight = torch.cat([projection.weight for projection in projections])
    bias = None if self.q_proj.bias is None else torch.cat([projection.bias for projection in projections])
    sizes = [projection.weight.shape[0] for projection in projections]
    query, key, value = torch.split(functional.linear(hidden_states, weight, bias), sizes, dim=-1)
    if hasattr(self, "q_norm"):
        query, key = _per_head(self.q_norm, query), _per_head(self.k_norm, key)
    return self.o_proj(past_key_values.attend(query, key, value, self)), None


def _per_head(norm: Any, heads: Tensor) -> Tensor:
    """`Gemma3RMSNorm` over each head of [B, S, heads * D], as one op that needs no other shape for it."""
    normed: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::BranchwiseRMSNorm",
        [heads, 1.0 + norm.weight.float()],
        attrs={"num_branches": heads.shape[-1] // norm.weight.shape[0], "epsilon": norm.eps},
        dtype=heads.dtype,
        shape=heads.shape,
        version=1,
    )
    return normed


FUSED_ATTENTION = Patch(
    name="fused_attention",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3Attention.forward",
    signature=(
        "self",
        "hidden_states",
        "position_embeddings",
        "attention_mask",
        "past_key_values",
        "kwargs",
    ),
    replacement=forward,
    reason="a token's time is reading weights: one product reads them at once, and one op moves no cache",
    upstream="https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md",
    remove_when="transformers' attention interface hands over queries and keys before RoPE",
)
LLAMA_FUSED_ATTENTION = replace(
    FUSED_ATTENTION,
    name="llama_fused_attention",
    target="transformers.models.llama.modeling_llama:LlamaAttention.forward",
)
QWEN2_FUSED_ATTENTION = replace(
    FUSED_ATTENTION,
    name="qwen2_fused_attention",
    target="transformers.models.qwen2.modeling_qwen2:Qwen2Attention.forward",
)
