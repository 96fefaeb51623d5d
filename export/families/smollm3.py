"""SmolLM 3: `SmolLM3ForCausalLM`. Every fourth layer, or what the config lists, has no RoPE."""

from __future__ import annotations

from transformers import SmolLM3ForCausalLM
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from stillgraph.exporter.families import decoder_family, layer_types
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    SmolLM3ForCausalLM,
    norm=smollm3.SmolLM3RMSNorm,
    attention=fused_attention(smollm3.SmolLM3Attention, rotates="use_rope"),
    mlp=smollm3.SmolLM3MLP,
    kinds=layer_types,
)
