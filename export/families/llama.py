"""Llama 2 and 3, and what shares their architecture: `LlamaForCausalLM`."""

from __future__ import annotations

from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

from stillgraph.exporter.families import decoder_family, full_layers
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    LlamaForCausalLM,
    norm=llama.LlamaRMSNorm,
    attention=fused_attention(llama.LlamaAttention),
    mlp=llama.LlamaMLP,
    kinds=full_layers,
)
