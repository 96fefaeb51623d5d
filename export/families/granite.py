"""Granite 3, dense: `GraniteForCausalLM`. Three of its four multipliers are the decoder's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GraniteForCausalLM
from transformers.models.granite import modeling_granite as granite

from stillgraph.exporter.families import decoder_family, full_layers
from stillgraph.patches.fused_attention import fused_attention


def scaled(config: Any, logits: Tensor) -> Tensor:
    """Logits as in `GraniteForCausalLM.forward`."""
    quotient: Tensor = logits / config.logits_scaling
    return quotient


FAMILY = decoder_family(
    GraniteForCausalLM,
    norm=granite.GraniteRMSNorm,
    attention=fused_attention(granite.GraniteAttention),
    mlp=granite.GraniteMLP,
    kinds=full_layers,
    logits=scaled,
)
