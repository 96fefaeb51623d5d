"""Gemma 3, text: `Gemma3ForCausalLM`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from stillgraph.exporter.families import Family, decoder_spec, refuse_heads, refuse_layers, refuse_rope
from stillgraph.patches.fused_attention import FUSED_ATTENTION
from stillgraph.patches.fused_mlp import FUSED_MLP
from stillgraph.patches.half_weights import HALF_EMBEDDING, HALF_LINEAR, HALF_TIED_EMBEDDING
from stillgraph.patches.patch import Patch
from stillgraph.patches.rms_norm import RMS_NORM
from stillgraph.patches.rms_normalization import RMS_NORMALIZATION
from stillgraph.patches.tied_embedding import TIED_EMBEDDING

ROPE_TYPES = ("default", "linear")


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention"
    if "rope_type" in config.rope_parameters:  # transformers reads none of it, not even a scaling
        return "rope_parameters without a part for each layer kind"
    if problem := refuse_layers(config.layer_types, config):
        return problem
    for kind in dict.fromkeys(config.layer_types):
        if problem := refuse_rope(config.rope_parameters[kind], ROPE_TYPES, f"of its {kind} layers"):
            return problem
    return refuse_heads(config)


def rotary(module: Any, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D]: the kinds of layers have frequencies of their own."""
    cos, sin = module(positions.new_zeros(1).float(), positions, kind)
    return cos, sin


def patches(config: Any, target: str, precision: str) -> tuple[Patch, ...]:
    """What the target's ops ask for, and how the embedding shares the head's matrix where they are tied."""
    tied = config.tie_word_embeddings
    norm = (RMS_NORM,) if target == "portable" else (RMS_NORMALIZATION, FUSED_ATTENTION, FUSED_MLP)
    if precision == "fp16":
        return *norm, HALF_LINEAR, HALF_TIED_EMBEDDING if tied else HALF_EMBEDDING
    # Quantized rows are gathered as they are stored; a block of them lies along the row.
    return (*norm, TIED_EMBEDDING) if tied and precision == "fp32" else norm


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    config=Gemma3TextConfig.from_dict,
    refuse=refuse,
    spec=partial(decoder_spec, "Gemma3ForCausalLM"),
    build=Gemma3ForCausalLM,
    patches=patches,
    rotary=rotary,
)
