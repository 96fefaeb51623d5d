"""Pixels equal to transformers' Pillow processors, bit for bit, and files equal to its `load_image`."""

from __future__ import annotations

import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from stillgraph.vision.preprocessor import Preprocessor, open_image

THEIRS: dict[str, Any] = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "Gemma3ImageProcessor": Gemma3ImageProcessorPil,
}
MODES = "1 L P RGB RGBA RGBX RGBa CMYK YCbCr HSV I F LA PA I;16 I;16B transparent keyed".split()
EXTREMES = [(1, 1), (17, 4000), (4000, 17), (224, 224), (896, 896), (1, 2), (225, 224), (223, 500)]
GEMMA = {"size": {"height": 896, "width": 896}, "do_pan_and_scan": None, "do_center_crop": None}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("CLIPImageProcessor", {}),
    ("CLIPImageProcessor", {"size": 224, "crop_size": 224}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": {"height": 50, "width": 31}}),
    ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 17, "resample": 2}),
    ("CLIPImageProcessor", {"size": [33, 48], "do_center_crop": False, "resample": 1}),
    ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 97, "width": 300}}),
    ("CLIPImageProcessor", {"do_rescale": False, "resample": 0}),
    ("CLIPImageProcessor", {"do_normalize": False, "resample": 4}),
    ("CLIPImageProcessor", {"rescale_factor": 0.0078125, "image_mean": 0.3, "image_std": [0.1, 0.7, 1.3]}),
    ("CLIPImageProcessor", {"size": 40, "default_to_square": True, "crop_size": 41, "resample": 5}),
    ("CLIPImageProcessor", {"size": [40, 41], "do_center_crop": None, "do_rescale": None, "crop_size": None}),
    ("CLIPImageProcessor", {"do_normalize": None, "image_mean": None, "size": 30}),
    ("LlavaImageProcessor", {"do_pad": False}),
    ("SiglipImageProcessor", {}),
    (
        "SiglipImageProcessor",
        {"size": {"height": 384, "width": 200}, "do_center_crop": True, "crop_size": 61},
    ),
    ("Gemma3ImageProcessor", {"image_seq_length": 256}),
    ("Gemma3ImageProcessor", {"size": 65}),
    ("Gemma3ImageProcessor", GEMMA),
]


@cache
def picture(seed: int) -> Image.Image:
    """Noise over a slope, in one of the modes, of an extreme size first and then of a random one."""
    random = np.random.default_rng(seed)
    mode, size = MODES[seed % len(MODES)], tuple(random.integers(1, 601, 2).tolist())
    return noise(random, mode, EXTREMES[seed] if seed < len(EXTREMES) else size)


def noise(random: np.random.Generator, mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    bands = random.integers(0, 256, (height, width, 4)) + np.linspace(0, 200, width)[None, :, None]
    pixels = np.clip(bands - 100, 0, 255).astype(np.uint8)
    rgba = Image.fromarray(pixels)
    if mode in ("I", "F", "I;16", "I;16B"):
        kind = {"I": "<i4", "F": "<f4", "I;16": "<u2", "I;16B": ">u2"}[mode]
        values = pixels[..., 0] * 3.7 - (40 if mode in "IF" else 0)
        return Image.frombytes(mode, size, values.astype(kind).tobytes())
    if mode == "transparent":  # a palette with an alpha for each color
        image = rgba.convert("RGB").quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    if mode == "keyed":  # one gray that stands for nothing
        image = rgba.convert("L")
        image.info["transparency"] = 0
        return image
    if mode in ("PA", "LA"):
        alpha = rgba.getchannel("A")
        image = Image.merge("LA", [rgba.getchannel("G"), alpha])
        return image if mode == "LA" else image.convert("PA")
    return rgba.convert("RGBA" if mode in ("RGBA", "RGBa") else "RGB").convert(mode)


def theirs(kind: str, config: dict[str, Any], image: Image.Image) -> np.ndarray:
    return np.stack(THEIRS[kind](**config)(image)["pixel_values"])


def assert_equal_bits(ours: np.ndarray, wanted: np.ndarray) -> None:
    assert ours.dtype == wanted.dtype == np.float32
    assert ours.shape == wanted.shape
    assert np.array_equal(ours, wanted), f"{(ours != wanted).sum()} differ, by {abs(ours - wanted).max()}"


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda index: f"{CASES[index][0][:4]}{index}")
def test_pixels_equal_the_processor_of_transformers(case: int) -> None:
    kind, config = CASES[case]
    preprocessor = Preprocessor.of({"image_processor_type": kind, **config})
    # 13 random pictures a case, others each time, 234 in all; the extremes are slow
    extremes = range(len(EXTREMES) if case % 4 == 0 or config is GEMMA else 0)
    for seed in [*extremes, *range(8 + 13 * case, 8 + 13 * case + 13)]:
        image = picture(seed)
        ours = preprocessor.pixel_values([image])
        assert ours.flags.c_contiguous
        assert_equal_bits(ours, theirs(kind, config, image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor"])
def test_every_mode_equals(kind: str, mode: str) -> None:
    image = noise(np.random.default_rng(5), mode, (61, 43))
    before = image.copy()
    ours = Preprocessor.of({"image_processor_type": kind}).pixel_values([image])
    assert_equal_bits(ours, theirs(kind, {}, image))
    assert image == before


def test_null_converts_to_rgb_as_the_processor_of_gemma_3_asks_for() -> None:
    preprocessor = Preprocessor.of({"image_processor_type": "Gemma3ImageProcessor", "do_convert_rgb": None})
    for seed in (1, 3, 4):
        wanted = theirs("Gemma3ImageProcessor", {}, picture(seed))
        assert_equal_bits(preprocessor.pixel_values([picture(seed)]), wanted)


def test_a_batch_is_its_images_in_order() -> None:
    preprocessor = Preprocessor.of({"image_processor_type": "CLIPImageProcessor"})
    images = [picture(seed) for seed in (9, 10, 11)]
    assert_equal_bits(
        preprocessor.pixel_values(images),
        np.concatenate([theirs("CLIPImageProcessor", {}, image) for image in images]),
    )


def test_bare_pixels_are_the_values_as_float32() -> None:
    config = {"do_rescale": False, "do_normalize": False}
    ours = Preprocessor.of({"image_processor_type": "CLIPImageProcessor", **config}).pixel_values(
        [picture(20)]
    )
    wanted = theirs("CLIPImageProcessor", config, picture(20))
    assert wanted.dtype == np.uint8
    assert_equal_bits(ours, wanted.astype(np.float32))


@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_saves_is_read(kind: str, tmp_path: Path) -> None:
    processor = THEIRS[kind](resample=4, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    wanted = np.stack(processor(picture(30))["pixel_values"])
    assert_equal_bits(Preprocessor.read(tmp_path).pixel_values([picture(30)]), wanted)
    file = next(tmp_path.glob("*.json"))
    assert Preprocessor.read(file) == Preprocessor.read(tmp_path)


def test_the_nested_config_counts_before_the_other(tmp_path: Path) -> None:
    nested = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 9}}
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert Preprocessor.read(tmp_path).size == 224
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert Preprocessor.read(tmp_path).size == (8, 9)


FILES = [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("PNG", "LA"),
    ("PNG", "1"),
    ("PNG", "I;16"),
    ("PNG", "transparent"),
    ("PNG", "keyed"),
    ("GIF", "P"),
    ("GIF", "keyed"),
    ("TIFF", "RGB"),
    ("TIFF", "F"),
    ("TIFF", "CMYK"),
    ("WEBP", "RGB"),
    ("WEBP", "RGBA"),
    ("BMP", "RGB"),
    ("PPM", "L"),
    ("JPEG2000", "RGB"),
    ("AVIF", "RGB"),
]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    image.save(file, kind, **options)
    return file.getvalue()


def assert_loads_equal(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    wanted = load_image(str(path))
    preprocessor = Preprocessor.of({"image_processor_type": "CLIPImageProcessor"})
    for source in (path, str(path), data):
        ours = open_image(source)
        assert (ours.mode, ours.size) == (wanted.mode, wanted.size)
        assert np.array_equal(np.asarray(ours), np.asarray(wanted))
        assert_equal_bits(preprocessor.pixel_values([source]), theirs("CLIPImageProcessor", {}, wanted))


@pytest.mark.parametrize(("kind", "mode"), FILES, ids=["-".join(file) for file in FILES])
def test_a_file_is_read_as_transformers_reads_it(kind: str, mode: str, tmp_path: Path) -> None:
    image = noise(np.random.default_rng(6), mode, (47, 30))
    assert_loads_equal(encoded(image, kind), tmp_path / "picture")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photo_is_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(np.random.default_rng(7), "RGB", (20, 31)), kind, exif=exif)
    assert open_image(data).size == ((31, 20) if orientation > 4 else (20, 31))
    assert_loads_equal(data, tmp_path / "photo")


def test_an_image_of_pillow_keeps_its_orientation_and_frame() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(BytesIO(encoded(picture(40).convert("RGB"), "JPEG", exif=exif)))
    ours = Preprocessor.of({"image_processor_type": "CLIPImageProcessor"}).pixel_values([image])
    assert open_image(image) is image
    assert_equal_bits(ours, theirs("CLIPImageProcessor", {}, image))


def test_the_first_picture_of_a_phones_photo_counts(tmp_path: Path) -> None:
    first, preview = picture(41).convert("RGB"), picture(42).convert("RGB")
    data = encoded(first, "MPO", save_all=True, append_images=[preview])
    assert Image.open(BytesIO(data)).n_frames == 2
    assert_loads_equal(data, tmp_path / "photo.jpg")
