"""Qwen 2 and 2.5: `Qwen2ForCausalLM`."""

from __future__ import annotations

from transformers import Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from stillgraph.exporter.families import decoder_family, layer_types
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    Qwen2ForCausalLM,
    norm=qwen2.Qwen2RMSNorm,
    attention=fused_attention(qwen2.Qwen2Attention),
    mlp=qwen2.Qwen2MLP,
    kinds=layer_types,
)
