"""Gemma 2: `Gemma2ForCausalLM`. Attention scores and logits are soft-capped."""

from __future__ import annotations

from typing import Any

from transformers import Gemma2ForCausalLM
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from stillgraph.exporter.families import decoder_family, layer_types, softcapped
from stillgraph.patches.fused_attention import fused_attention


def refuse(config: Any) -> str | None:
    """What of a config that only Gemma 2 has the graphs would get wrong, or None."""
    return "use_bidirectional_attention" if config.use_bidirectional_attention else None


FAMILY = decoder_family(
    Gemma2ForCausalLM,
    norm=gemma2.Gemma2RMSNorm,
    shifted=True,
    attention=fused_attention(gemma2.Gemma2Attention, softcap="attn_logit_softcapping"),
    mlp=gemma2.Gemma2MLP,
    kinds=layer_types,
    refuse=refuse,
    logits=softcapped,
)
