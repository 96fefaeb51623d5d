"""Qwen 2 and 2.5: `Qwen2ForCausalLM`."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from stillgraph.exporter.families import Family, decoder_spec, refuse_heads, refuse_layers, refuse_rope
from stillgraph.patches.fused_attention import QWEN2_FUSED_ATTENTION
from stillgraph.patches.fused_mlp import QWEN2_FUSED_MLP
from stillgraph.patches.half_weights import HALF_LINEAR, PLAIN_HALF_EMBEDDING, PLAIN_HALF_TIED_EMBEDDING
from stillgraph.patches.patch import Patch
from stillgraph.patches.rms_norm import QWEN2_RMS_NORM
from stillgraph.patches.rms_normalization import QWEN2_RMS_NORMALIZATION
from stillgraph.patches.tied_embedding import PLAIN_TIED_EMBEDDING

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that no length of a text changes


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    problem = refuse_rope(config.rope_parameters, ROPE_TYPES, "of its layers")
    return problem or refuse_layers(config.layer_types, config) or refuse_heads(config)


def patches(config: Any, target: str, precision: str) -> tuple[Patch, ...]:
    """What the target's ops ask for, and how the embedding shares the head's matrix where they are tied."""
    tied = config.tie_word_embeddings
    fused = (QWEN2_RMS_NORMALIZATION, QWEN2_FUSED_ATTENTION, QWEN2_FUSED_MLP)
    norm = (QWEN2_RMS_NORM,) if target == "portable" else fused
    if precision == "fp16":
        return *norm, HALF_LINEAR, PLAIN_HALF_TIED_EMBEDDING if tied else PLAIN_HALF_EMBEDDING
    # Quantized rows are gathered as they are stored; a block of them lies along the row.
    return (*norm, PLAIN_TIED_EMBEDDING) if tied and precision == "fp32" else norm


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    config=Qwen2Config.from_dict,
    refuse=refuse,
    spec=partial(decoder_spec, "Qwen2ForCausalLM"),
    build=Qwen2ForCausalLM,
    patches=patches,
)
