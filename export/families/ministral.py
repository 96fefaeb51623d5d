"""Ministral 8B: `MinistralForCausalLM`."""

from __future__ import annotations

from transformers import MinistralForCausalLM
from transformers.models.ministral import modeling_ministral as ministral

from stillgraph.exporter.families import decoder_family, layer_types
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    MinistralForCausalLM,
    norm=ministral.MinistralRMSNorm,
    attention=fused_attention(ministral.MinistralAttention),
    mlp=ministral.MinistralMLP,
    kinds=layer_types,
)
