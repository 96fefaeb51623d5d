"""LLaVA, a CLIP tower before a decoder of another family: `LlavaForConditionalGeneration`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from stillgraph.exporter.families import Family, Masks, own_text, refuse_parts
from stillgraph.exporter.families.llama import FAMILY as LLAMA
from stillgraph.exporter.families.qwen2 import FAMILY as QWEN2
from stillgraph.patches.patch import Patch
from stillgraph.spec import ModelSpec, VisionSpec

TEXT = {family.model_type: family for family in (QWEN2, LLAMA)}
TOWER = "clip_vision_model"
MARK = "<image>"


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    if problem := refuse_parts(config, TEXT, TOWER):
        return problem
    text, vision = config.text_config, config.vision_config
    layers = vision.num_hidden_layers
    for layer in _chosen(config):
        if not -layers - 1 <= layer <= layers:
            return f"vision_feature_layer {layer} of a tower of {layers} layers"
    return TEXT[text.model_type].refuse(text)


def spec(config: Any) -> ModelSpec:
    """The shape of decoder and tower; a picture's tokens are its patches, and the class token if kept."""
    text, vision = TEXT[config.text_config.model_type].spec(config.text_config), config.vision_config
    patches_ = (vision.image_size // vision.patch_size) ** 2
    full = config.vision_feature_select_strategy == "full"
    pictures = VisionSpec(
        channels=vision.num_channels,
        height=vision.image_size,
        width=vision.image_size,
        image_tokens=patches_ + int(full),
        image_token=config.image_token_index,
        mark=MARK,
    )
    return text.model_copy(update={"architecture": "LlavaForConditionalGeneration", "vision": pictures})


def patches(config: Any, *how: Any) -> tuple[Patch, ...]:
    """Those of the decoder."""
    return TEXT[config.text_config.model_type].patches(own_text(config), *how)


def features(model: Any, pixel_values: Tensor) -> Tensor:
    """`LlavaModel.get_image_features` without its hooks, and without the layers behind the last chosen."""
    tower, config = model.model.vision_tower, model.config
    hidden = [tower.pre_layrnorm(tower.embeddings(pixel_values))]
    chosen = [layer % (len(tower.encoder.layers) + 1) for layer in _chosen(config)]
    for layer in tower.encoder.layers[: max(chosen)]:
        hidden.append(layer(hidden[-1], attention_mask=None))
    first = 1 if config.vision_feature_select_strategy == "default" else 0  # the class token is left out
    selected = torch.cat([hidden[layer][:, first:] for layer in chosen], dim=-1)
    projected: Tensor = model.model.multi_modal_projector(selected)
    return projected


def masks(config: Any, by_kind: Masks) -> Any:
    """As the decoder takes them."""
    return TEXT[config.text_config.model_type].masks(config.text_config, by_kind)


def decoder(model: Any) -> Any:
    return model.model.language_model


def _chosen(config: Any) -> list[int]:
    layers = config.vision_feature_layer
    return [layers] if isinstance(layers, int) else list(layers)


FAMILY = Family(
    architecture="LlavaForConditionalGeneration",
    model_type="llava",
    config=LlavaConfig.from_dict,
    refuse=refuse,
    spec=spec,
    build=LlavaForConditionalGeneration,
    patches=patches,
    masks=masks,
    decoder=decoder,
    features=features,
)
