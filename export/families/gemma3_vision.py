"""Gemma 3 with a SigLIP tower: `Gemma3ForConditionalGeneration`. The tokens of a picture see each other."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from stillgraph.exporter.families import Family, own_text, refuse_parts
from stillgraph.exporter.families.gemma3 import FAMILY as TEXT
from stillgraph.patches.patch import Patch
from stillgraph.spec import ModelSpec, VisionSpec

ARCHITECTURE = "Gemma3ForConditionalGeneration"
TOWER = "siglip_vision_model"
BEGIN, END = "<start_of_image>", "<end_of_image>"


def refuse(config: Any) -> str | None:
    """The first thing in a config that the graphs would get wrong, or None."""
    if problem := refuse_parts(config, (TEXT.model_type,), TOWER):
        return problem
    vision = config.vision_config
    patches_, side = vision.image_size // vision.patch_size, math.isqrt(config.mm_tokens_per_image)
    if side**2 != config.mm_tokens_per_image or side < 1 or patches_ % side:
        return f"mm_tokens_per_image {config.mm_tokens_per_image} of {patches_} x {patches_} patches"
    return TEXT.refuse(config.text_config)


def spec(config: Any) -> ModelSpec:
    """The shape of decoder and tower; a picture's text is what `Gemma3Processor` makes of its mark."""
    vision = config.vision_config
    pictures = VisionSpec(
        channels=vision.num_channels,
        height=vision.image_size,
        width=vision.image_size,
        image_tokens=config.mm_tokens_per_image,
        image_token=config.image_token_id,
        mark=BEGIN,
        bidirectional=True,
        before=f"\n\n{BEGIN}",
        after=f"{END}\n\n",
    )
    text = TEXT.spec(config.text_config)
    return text.model_copy(update={"architecture": ARCHITECTURE, "vision": pictures})


def patches(config: Any, *how: Any) -> tuple[Patch, ...]:
    """Those of the decoder."""
    return TEXT.patches(own_text(config), *how)


def features(model: Any, pixel_values: Tensor) -> Tensor:
    """`Gemma3Model.get_image_features` without its hooks, and without the unused pooling head."""
    tower = model.model.vision_tower
    hidden = tower.embeddings(pixel_values)
    for layer in tower.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    projected: Tensor = model.model.multi_modal_projector(tower.post_layernorm(hidden))
    return projected


def decoder(model: Any) -> Any:
    return model.model.language_model


FAMILY = Family(
    architecture=ARCHITECTURE,
    model_type="gemma3",
    config=Gemma3Config.from_dict,
    refuse=refuse,
    spec=spec,
    build=Gemma3ForConditionalGeneration,
    patches=patches,
    rotary=TEXT.rotary,
    decoder=decoder,
    logits=TEXT.logits,
    features=features,
)
