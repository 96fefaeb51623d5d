"""Llama 2 and 3, and what shares their architecture: `LlamaForCausalLM`."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from stillgraph.exporter.families import Family, Masks, decoder_spec, refuse_heads, refuse_rope
from stillgraph.patches.fused_attention import LLAMA_FUSED_ATTENTION
from stillgraph.patches.fused_mlp import LLAMA_FUSED_MLP
from stillgraph.patches.half_weights import HALF_LINEAR, PLAIN_HALF_EMBEDDING, PLAIN_HALF_TIED_EMBEDDING
from stillgraph.patches.patch import Patch
from stillgraph.patches.rms_norm import LLAMA_RMS_NORM
from stillgraph.patches.rms_normalization import LLAMA_RMS_NORMALIZATION
from stillgraph.patches.tied_embedding import PLAIN_TIED_EMBEDDING

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that no length of a text changes


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    problem = refuse_rope(config.rope_parameters, ROPE_TYPES, "of its layers")
    return problem or refuse_heads(config)


def patches(config: Any, target: str, precision: str) -> tuple[Patch, ...]:
    """What the target's ops ask for, and how the embedding shares the head's matrix where they are tied."""
    tied = config.tie_word_embeddings
    fused = (LLAMA_RMS_NORMALIZATION, LLAMA_FUSED_ATTENTION, LLAMA_FUSED_MLP)
    norm = (LLAMA_RMS_NORM,) if target == "portable" else fused
    if precision == "fp16":
        return *norm, HALF_LINEAR, PLAIN_HALF_TIED_EMBEDDING if tied else PLAIN_HALF_EMBEDDING
    # Quantized rows are gathered as they are stored; a block of them lies along the row.
    return (*norm, PLAIN_TIED_EMBEDDING) if tied and precision == "fp32" else norm


def masks(config: Any, by_kind: Masks) -> Any:
    """One mask for all layers, which are of one kind."""
    return by_kind["full_attention"]


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    config=LlamaConfig.from_dict,
    refuse=refuse,
    spec=partial(decoder_spec, "LlamaForCausalLM"),
    build=LlamaForCausalLM,
    patches=patches,
    masks=masks,
)
