"""A picture of any size and mode, from the file to the logits, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from stillgraph import load
from stillgraph.manifest import read

FP32 = 1e-5  # sums in another order
SIZES = [(1, 1), (17, 4000), (4000, 17), (224, 224), (896, 896)]
MODES = "1 L P RGB RGBA CMYK YCbCr HSV I F LA PA I;16".split()
MARKS = {"llava": "<image>", "gemma3_vision": "<start_of_image>"}


def of_mode(mode: str) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (30, 43, 4), np.uint8)
    if mode in ("I", "F", "I;16"):
        kind = {"I": "<i4", "F": "<f4", "I;16": "<u2"}[mode]
        return Image.frombytes(mode, (43, 30), pixels[..., 0].astype(kind).tobytes())
    image = Image.fromarray(pixels)
    if mode == "PA":
        return image.convert("LA").convert("PA")
    if mode in ("1", "CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")
    return image.convert(mode)


def turned(path: Path, orientation: int) -> Path:
    """A file whose EXIF says how it is to be turned."""
    image = of_mode("RGB")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("family", MARKS)
def test_features_and_logits(
    tiny_bundle: Callable[..., Path], original: Any, drawn: Any, tmp_path: Path, family: str
) -> None:
    bundle = tiny_bundle(family=family)
    checkpoint = read(bundle).source.id
    model, engine = original(checkpoint), load(bundle, threads=1)
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    vision, ids = engine.vision, engine.ids(f"a {MARKS[family]}b")
    assert vision is not None
    text = torch.tensor([ids])
    types = {"token_type_ids": (text == vision.spec.image_token).long()} if vision.spec.bidirectional else {}
    images = [drawn(3, *size) for size in SIZES] + [of_mode(mode) for mode in MODES]
    for image in [*images, *(turned(tmp_path / f"{turn}.png", turn) for turn in (3, 6, 7))]:
        theirs = image if isinstance(image, Image.Image) else load_image(str(image))
        pixels = processor(images=theirs, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels).pooler_output[0].numpy()
            logits = model(input_ids=text, pixel_values=pixels, **types).logits[0, -1].numpy()
        input_ids = vision.place(ids, [image])
        vision.see([input_ids], engine.graphs.release)
        rows = np.zeros((len(input_ids), features.shape[1]), np.float32)
        vision.fill(input_ids, rows)
        found = rows[[input_id < 0 for input_id in input_ids]]
        assert np.abs(found - features).max() <= FP32 * np.abs(features).max(), image
        found = engine.graphs.prefill([input_ids])[0]
        assert np.abs(found - logits).max() <= FP32 * np.abs(logits).max(), image
