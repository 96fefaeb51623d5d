"""Mistral: `MistralForCausalLM`. All layers have the window, where the config has one."""

from __future__ import annotations

from transformers import MistralForCausalLM
from transformers.models.mistral import modeling_mistral as mistral

from stillgraph.exporter.families import decoder_family, windowed_layers
from stillgraph.patches.fused_attention import fused_attention
from stillgraph.patches.fused_mlp import fused_mlp

FAMILY = decoder_family(
    MistralForCausalLM,
    norm=mistral.MistralRMSNorm,
    fused=(fused_attention(mistral.MistralAttention), fused_mlp(mistral.MistralMLP)),
    kinds=windowed_layers,
)
