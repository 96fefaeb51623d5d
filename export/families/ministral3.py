"""Ministral 3, text: `Ministral3ForCausalLM`. Queries grow with their positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Ministral3ForCausalLM
from transformers.models.ministral3 import modeling_ministral3 as ministral3

from stillgraph.exporter.families import decoder_family, windowed_layers
from stillgraph.patches.fused_attention import fused_attention

NEEDED = ("llama_4_scaling_beta", "original_max_position_embeddings")


def refuse(config: Any) -> str | None:
    """What of a config that only Ministral 3 has the graphs would get wrong, or None."""
    missing = next((name for name in NEEDED if config.rope_parameters.get(name) is None), None)
    return missing and f"rope_parameters without {missing}"


def scale(attention: Any, positions: Tensor) -> Tensor:
    """What queries are multiplied by at positions [B, S]: [B, S, 1]."""
    beta, length = (attention.config.rope_parameters[name] for name in NEEDED)
    factors: Tensor = ministral3.get_llama_4_attn_scale(positions, beta, length)  # [B, 1, S, 1]
    return factors[:, 0]


FAMILY = decoder_family(
    Ministral3ForCausalLM,
    norm=ministral3.Ministral3RMSNorm,
    attention=fused_attention(ministral3.Ministral3Attention, scale=scale),
    mlp=ministral3.Ministral3MLP,
    kinds=windowed_layers,
    refuse=refuse,
)
