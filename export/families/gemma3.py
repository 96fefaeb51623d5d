"""Gemma 3, text: `Gemma3ForCausalLM`."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from export.families import Family
from patches.fused_attention import FUSED_ATTENTION
from patches.fused_mlp import FUSED_MLP
from patches.half_weights import HALF_EMBEDDING, HALF_LINEAR, HALF_TIED_EMBEDDING
from patches.patch import Patch
from patches.rms_norm import RMS_NORM
from patches.rms_normalization import RMS_NORMALIZATION
from patches.tied_embedding import TIED_EMBEDDING
from runtime.spec import LayerSpec, ModelSpec

KINDS = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear")


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    if config.use_bidirectional_attention:
        return "use_bidirectional_attention"
    if "rope_type" in config.rope_parameters:  # transformers reads none of it, not even a scaling
        return "rope_parameters without a part for each layer kind"
    if len(config.layer_types) != config.num_hidden_layers:
        return f"{len(config.layer_types)} layer_types for {config.num_hidden_layers} layers"
    for kind in config.layer_types:
        if kind not in KINDS:
            return f"layer type {kind!r}"
        rope = config.rope_parameters[kind]
        # The old key `type` is kept by transformers and not read: such a scaling would be lost.
        if (name := rope.get("type", rope["rope_type"])) not in ROPE_TYPES:
            return f"RoPE type {name!r} of its {kind} layers"
        if name != rope["rope_type"]:
            return f"'type' in place of 'rope_type' in the RoPE parameters of its {kind} layers"
    if "sliding_attention" in config.layer_types and (config.sliding_window or 0) < 1:
        return f"sliding_window {config.sliding_window!r} with sliding layers"
    if config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} heads over {config.num_key_value_heads} key/value heads"
    if getattr(config, "quantization_config", None) is not None:
        return "a quantised checkpoint (quantization_config)"
    return None


def spec(config: Any) -> ModelSpec:
    """The shape of a Gemma 3 decoder, from its config alone."""
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    return ModelSpec(
        architecture="Gemma3ForCausalLM",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        layers=tuple(LayerSpec(kind=kind, window=windows[kind]) for kind in config.layer_types),
    )


def patches(config: Any, target: str, precision: str) -> tuple[Patch, ...]:
    """What the target's ops ask for, and how the embedding shares the head's matrix where they are tied."""
    tied = config.tie_word_embeddings
    norm = (RMS_NORM,) if target == "portable" else (RMS_NORMALIZATION, FUSED_ATTENTION, FUSED_MLP)
    if precision == "fp16":
        return *norm, HALF_LINEAR, HALF_TIED_EMBEDDING if tied else HALF_EMBEDDING
    # Quantised rows are gathered as they are stored; a block of them lies along the row.
    return (*norm, TIED_EMBEDDING) if tied and precision == "fp32" else norm


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    config=Gemma3TextConfig.from_dict,
    refuse=refuse,
    spec=spec,
    build=Gemma3ForCausalLM,
    patches=patches,
)
