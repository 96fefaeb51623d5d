"""Model families: one file each, found by the architecture that a checkpoint names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stillgraph.patches.patch import Patch
from stillgraph.spec import LayerKind, LayerSpec, ModelSpec

Masks = Mapping[str, Tensor | None]


def by_kind(config: Any, masks: Masks) -> Any:
    """The masks as a decoder takes them whose layers differ: a dict by layer kind."""
    return dict(masks)


def text_decoder(model: Any) -> Any:
    """The decoder of a causal language model."""
    return model.model


def positional(rotary: Any, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, D] of a rotary embedding that is the same in every layer."""
    cos, sin = rotary(positions.new_zeros(1).float(), positions)
    return cos, sin


@dataclass(frozen=True)
class Family:
    """What the export must know of an architecture of transformers.

    architecture: its class name; model_type: the `model_type` of its config; config(raw): the config object
    of a raw config.json; refuse(config): why such a checkpoint cannot be exported, or None; spec(config): the
    model's shape; build(config): the model, weights not initialized; patches(config, target, precision): what
    is changed while it is traced; masks(config, masks by layer kind): what its decoder takes as
    attention_mask; rotary(its rotary embedding, positions [B, S], layer kind): cos and sin [B, S, D];
    decoder(model): the part that `lm_head` follows; features(model, pixel_values [N, 3, H, W]): what stands
    for N pictures in a prompt, [N, T, hidden]; None where it takes no pictures.
    """

    architecture: str
    model_type: str
    config: Callable[[dict[str, Any]], Any]
    refuse: Callable[[Any], str | None]
    spec: Callable[[Any], ModelSpec]
    build: Callable[[Any], Any]
    patches: Callable[[Any, str, str], tuple[Patch, ...]]
    masks: Callable[[Any, Masks], Any] = by_kind
    rotary: Callable[[Any, Tensor, str], tuple[Tensor, Tensor]] = positional
    decoder: Callable[[Any], Any] = text_decoder
    features: Callable[[Any, Tensor], Tensor] | None = None


def families() -> dict[str, Family]:
    """Every family of this folder, by architecture. A new one is a new file with a FAMILY in it."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.architecture: family for family in found}


def own_text(config: Any) -> Any:
    """The decoder's config of a model that sees; whether head and embedding are tied is in the whole
    config."""
    text = config.text_config
    return type(text).from_dict(text.to_dict() | {"tie_word_embeddings": config.tie_word_embeddings})


def refuse_parts(config: Any, texts: Container[str], tower: str) -> str | None:
    """Why a model that sees cannot be exported for the kind of its decoder or tower, or None."""
    text, vision = config.text_config, config.vision_config
    if text.model_type not in texts:
        return f"a language model of type {text.model_type!r}"
    if vision.model_type != tower:
        return f"a vision tower of type {vision.model_type!r}"
    for name, sizes in (("image_size", vision.image_size), ("patch_size", vision.patch_size)):
        if not isinstance(sizes, int):
            return f"{name} {sizes} of the vision tower"
    return None


def refuse_heads(config: Any) -> str | None:
    """The first thing that is wrong with any decoder's heads or weights, or None."""
    if config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} heads over {config.num_key_value_heads} key/value heads"
    if getattr(config, "quantization_config", None) is not None:
        return "a quantized checkpoint (quantization_config)"
    return None


def refuse_rope(rope: Mapping[str, Any], known: tuple[str, ...], where: str) -> str | None:
    """Why the RoPE parameters of some layers cannot be exported, or None. where: such as "of its layers"."""
    # The old key `type` is kept by transformers and not read: such a scaling would be lost.
    if (name := rope.get("type", rope["rope_type"])) not in known:
        return f"RoPE type {name!r} {where}"
    if name != rope["rope_type"]:
        return f"'type' in place of 'rope_type' in the RoPE parameters {where}"
    if (factor := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return f"partial_rotary_factor {factor} {where}"
    return None


def refuse_layers(kinds: list[LayerKind], config: Any) -> str | None:
    """Why layers of these kinds cannot be exported, or None."""
    if len(kinds) != config.num_hidden_layers:
        return f"{len(kinds)} layer_types for {config.num_hidden_layers} layers"
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            return f"layer type {kind!r}"
    if "sliding_attention" in kinds and (config.sliding_window or 0) < 1:
        return f"sliding_window {config.sliding_window!r} with sliding layers"
    return None


def decoder_spec(architecture: str, config: Any) -> ModelSpec:
    """The shape of a decoder, from its config alone."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    windows = {"sliding_attention": window, "full_attention": None}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        layers=tuple(
            LayerSpec(kind=kind, window=windows[kind], kv_heads=config.num_key_value_heads, head_dim=head_dim)
            for kind in kinds
        ),
    )
