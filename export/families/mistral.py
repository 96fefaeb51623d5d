"""Mistral: `MistralForCausalLM`. All layers have the window, where the config has one."""

from __future__ import annotations

from transformers import MistralForCausalLM
from transformers.models.mistral import modeling_mistral as mistral

from stillgraph.exporter.families import decoder_family, windowed_layers
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    MistralForCausalLM,
    norm=mistral.MistralRMSNorm,
    attention=fused_attention(mistral.MistralAttention),
    mlp=mistral.MistralMLP,
    kinds=windowed_layers,
)
