"""Gemma 3, text: `Gemma3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Gemma3ForCausalLM
from transformers.models.gemma3 import modeling_gemma3 as gemma3

from stillgraph.exporter.families import decoder_family, layer_types, softcapped
from stillgraph.patches.fused_attention import fused_attention
from stillgraph.patches.ordered_rotary import ordered_rotary


def refuse(config: Any) -> str | None:
    """What of a config that only Gemma 3 has the graphs would get wrong, or None."""
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention"
    if "rope_type" in config.rope_parameters:  # transformers reads none of it, not even a scaling
        return "rope_parameters without a part for each layer kind"
    return None


def rotary(module: Any, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D]: the kinds of layers have frequencies of their own."""
    cos, sin = module(positions.new_zeros(1).float(), positions, kind)
    return cos, sin


FAMILY = decoder_family(
    Gemma3ForCausalLM,
    norm=gemma3.Gemma3RMSNorm,
    shifted=True,
    attention=fused_attention(gemma3.Gemma3Attention, shifted=True),
    mlp=gemma3.Gemma3MLP,
    kinds=layer_types,
    refuse=refuse,
    ropes=lambda config: {kind: config.rope_parameters[kind] for kind in config.layer_types},
    rope_types=("default", "linear"),
    rotary=rotary,
    traced=lambda config: (ordered_rotary(gemma3.Gemma3RotaryEmbedding),),
    logits=softcapped,
)
