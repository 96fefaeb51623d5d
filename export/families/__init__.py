"""Model families: one file each, found by the architecture that a checkpoint names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor, nn

from stillgraph.errors import StillgraphError
from stillgraph.exporter.targets import TARGETS
from stillgraph.manifest import Precision, Target
from stillgraph.patches.fused_mlp import fused_mlp
from stillgraph.patches.half_weights import half_embedding, half_linear
from stillgraph.patches.patch import Patch
from stillgraph.patches.rms_norm import rms_norm
from stillgraph.patches.rms_normalization import rms_normalization
from stillgraph.patches.tied_embedding import tied_embedding
from stillgraph.spec import LayerKind, LayerSpec, ModelSpec

STAGE = "find model families"
ENTRY_POINTS = "stillgraph.families"  # the group by which other packages bring families
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that no length of a text changes
# Keys of what these architectures do not have, so transformers reads none of them.
FOREIGN = (
    "num_local_experts num_experts n_routed_experts num_nextn_predict_layers attention_sinks"
    " attention_chunk_size kv_lora_rank"
).split()
Masks = Mapping[str, Tensor | None]
Kinds = Callable[[Any], list[LayerKind]]


def by_kind(config: Any, masks: Masks) -> Any:
    """The masks as a decoder takes them whose layers differ: a dict by layer kind."""
    return dict(masks)


def only_mask(config: Any, masks: Masks) -> Any:
    """The mask as a decoder takes it whose layers are of one kind."""
    (mask,) = masks.values()
    return mask


def text_decoder(model: Any) -> Any:
    """The decoder of a causal language model."""
    return model.model


def positional(rotary: Any, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, R] of a rotary embedding that is the same in every layer."""
    cos, sin = rotary(positions.new_zeros(1).float(), positions)
    return cos, sin


def plain(config: Any, logits: Tensor) -> Tensor:
    """Logits as they are."""
    return logits


def softcapped(config: Any, logits: Tensor) -> Tensor:
    """Logits as in `Gemma2ForCausalLM.forward` and `Gemma3ForCausalLM.forward`."""
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True)
class Family:
    """What the export must know of an architecture of transformers.

    architecture: its class name; model_type: the `model_type` of its config; config(raw): the config object
    of a raw config.json; refuse(config): why such a checkpoint cannot be exported, or None; spec(config): the
    model's shape; build: its class in transformers; patches(config, target, precision): what is
    changed while it is traced; masks(config, masks by layer kind): what its decoder takes as attention_mask;
    rotary(its rotary embedding, positions [B, S], layer kind): cos and sin [B, S, R], R the part of a head
    that is rotated; decoder(model): the part that `lm_head` follows; logits(decoder's config, what `lm_head`
    returns); limit: what its max_position_embeddings are, in words; features(model, pixel_values [N, 3, H,
    W]): what stands for N pictures in a prompt, [N, T, hidden]; None where it takes no pictures.
    """

    architecture: str
    model_type: str
    config: Callable[[dict[str, Any]], Any]
    refuse: Callable[[Any], str | None]
    spec: Callable[[Any], ModelSpec]
    build: Any
    patches: Callable[..., tuple[Patch, ...]]
    masks: Callable[[Any, Masks], Any] = by_kind
    rotary: Callable[[Any, Tensor, str], tuple[Tensor, Tensor]] = positional
    decoder: Callable[[Any], Any] = text_decoder
    logits: Callable[[Any, Tensor], Tensor] = plain
    limit: Callable[[Any], str] = lambda config: "max_position_embeddings"
    features: Callable[[Any, Tensor], Tensor] | None = None


def families() -> dict[str, Family]:
    """Every family by architecture: of this folder, a file each with a FAMILY in it, and of other packages.

    Raises StillgraphError for an entry point that cannot be loaded, and for an architecture that has two.
    """
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    own = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    found = {family.architecture: family for family in own}
    for entry in entry_points(group=ENTRY_POINTS):
        family = _loaded(entry)
        if family.architecture in found:
            problem = f"entry point {entry.name} = {entry.value} of {_owner(entry)} has a family for"
            problem += f" {family.architecture}, which there is already"
            raise StillgraphError(STAGE, problem, f"uninstall {_owner(entry)}")
        found[family.architecture] = family
    return found


def _loaded(entry: EntryPoint) -> Family:
    try:
        family = entry.load()
    except Exception as error:  # whatever another package's import raises
        problem = f"entry point {entry.name} = {entry.value} of {_owner(entry)} cannot be loaded"
        problem += f" ({type(error).__name__}: {' '.join(str(error).split())})"
        raise StillgraphError(STAGE, problem, f"fix or uninstall {_owner(entry)}") from error
    if not isinstance(family, Family):
        problem = f"entry point {entry.name} = {entry.value} of {_owner(entry)} is a {type(family).__name__}"
        raise StillgraphError(STAGE, problem, "point it at a Family")
    return family


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "a package"


def decoder_family(
    model: Any,
    *,
    norm: type,
    attention: Patch,
    kinds: Kinds,
    mlp: type | None = None,
    shifted: bool = False,
    refuse: Callable[[Any], str | None] = lambda config: None,
    ropes: Callable[[Any], Mapping[str, Any]] = lambda config: {"": config.rope_parameters},
    rope_types: tuple[str, ...] = ROPE_TYPES,
    traced: Callable[[Any], tuple[Patch, ...]] = lambda config: (),
    **fields: Any,
) -> Family:
    """The family of a causal language model of transformers.

    model: its class; norm: the class of its norms, shifted: which scale by 1 + weight; attention: how it is
    changed for a target with ops of its own; mlp: the class with a product for gate and one for up, if any;
    kinds: one of `layer_types`, `full_layers`, `windowed_layers`; refuse: what is refused by name besides
    what every decoder is refused for; ropes(config): RoPE parameters by layer kind, of rope_types;
    traced(config): what is changed for both targets; fields: others of `Family`.
    """
    name = model.__name__
    values: dict[str, Any] = {
        "refuse": lambda config: (
            refuse(config) or refuse_decoder(config, name, kinds) or refuse_ropes(ropes(config), rope_types)
        ),
        "spec": partial(decoder_spec, name, kinds=kinds),
        "masks": by_kind if kinds is layer_types else only_mask,
    }

    def patches(config: Any, target: Target, precision: Precision) -> tuple[Patch, ...]:
        for_target: tuple[Patch, ...] = (rms_norm(norm, shifted),)
        if TARGETS[target].own_ops:
            for_target = rms_normalization(norm, shifted), attention
            for_target += (fused_mlp(mlp),) if mlp else ()
        return *traced(config), *for_target, *weight_patches(config.tie_word_embeddings, precision)

    return Family(
        architecture=name,
        model_type=model.config_class.model_type,
        config=model.config_class.from_dict,
        build=model,
        patches=patches,
        **values | fields,
    )


def weight_patches(tied: bool, precision: Precision) -> tuple[Patch, ...]:
    """How matrices are read in a precision, and how the embedding shares the head's where they are tied."""
    if precision == "fp16":
        return half_linear(nn.Linear), half_embedding(nn.Embedding, tied)
    # Quantized rows are gathered as they are stored; a block of them lies along the row.
    return (tied_embedding(nn.Embedding),) if tied and precision == "fp32" else ()


def layer_types(config: Any) -> list[LayerKind]:
    """The kind of each layer where a config has a list of them."""
    return list(config.layer_types)


def full_layers(config: Any) -> list[LayerKind]:
    """The kind of each layer of a model that has no window."""
    return ["full_attention"] * config.num_hidden_layers


def windowed_layers(config: Any) -> list[LayerKind]:
    """The kind of each layer of a model that has one window in all of them, or none."""
    kind: LayerKind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


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


def refuse_decoder(config: Any, architecture: str, kinds: Kinds) -> str | None:
    """The first thing that is wrong with any decoder's layers, heads or weights, or None."""
    if getattr(config, "is_heterogeneous", False):
        return "per_layer_config"
    if getattr(config, "is_causal", True) is False:  # transformers then masks nothing
        return "is_causal false"
    if problem := refuse_layers(kinds(config), config):
        return problem
    if kinds is not layer_types:
        # transformers makes its cache by these keys, and its masks without them.
        if getattr(config, "layer_types", None) not in (None, kinds(config)):
            return f"layer_types of a {architecture}"
        if kinds is full_layers and getattr(config, "sliding_window", None):
            return f"sliding_window {config.sliding_window} of a {architecture}"
    if config.num_key_value_heads < 1 or config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} heads over {config.num_key_value_heads} key/value heads"
    if getattr(config, "quantization_config", None) is not None:
        return "a quantized checkpoint (quantization_config)"
    found = next((name for name in FOREIGN if getattr(config, name, None)), None)
    return found and f"{found} {getattr(config, found)} of a {architecture}"


def refuse_ropes(ropes: Mapping[str, Any], known: tuple[str, ...]) -> str | None:
    """Why RoPE parameters cannot be exported, or None. ropes: by layer kind, or by "" for all layers."""
    for kind, rope in ropes.items():
        where = f"of its {kind} layers" if kind else "of its layers"
        if "rope_type" not in rope:
            return f"rope_parameters without a rope_type {where}"
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


def decoder_spec(architecture: str, config: Any, kinds: Kinds) -> ModelSpec:
    """The shape of a decoder, from its config alone."""
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
            for kind in kinds(config)
        ),
    )
