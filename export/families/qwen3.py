"""Qwen 3: `Qwen3ForCausalLM`. Queries and keys have norms, over each head."""

from __future__ import annotations

from transformers import Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from stillgraph.exporter.families import decoder_family, layer_types
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    Qwen3ForCausalLM,
    norm=qwen3.Qwen3RMSNorm,
    attention=fused_attention(qwen3.Qwen3Attention),
    mlp=qwen3.Qwen3MLP,
    kinds=layer_types,
)
