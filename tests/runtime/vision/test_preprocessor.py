"""Pictures and processors that are refused, each in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stillgraph.errors import StillgraphError
from stillgraph.vision import image_file
from stillgraph.vision.preprocessor import Preprocessor, open_image

CLIP = {"image_processor_type": "CLIPImageProcessor"}
FORMATS = ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF"]


def encoded(kind: str, size: tuple[int, int] = (24, 17), **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    start = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    pixels = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + pixels + chunk(b"IEND", b"")


VALID = {kind: encoded(kind) for kind in FORMATS}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "is empty"),
        (b"hello, world\n" * 9, "is not an image of a known kind"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image of a known kind"),
        (VALID["JPEG"][:-300], "cannot be decoded"),
        (VALID["PNG"][:-300], "cannot be decoded"),
        (VALID["PNG"][:60] + bytes(99) + VALID["PNG"][159:], "cannot be decoded"),
        (header(9000, 9943), "over 89478485 pixels"),
        (header(99_999, 99_999), "over 89478485 pixels"),
        (header(4, 0), "the data"),
    ],
    ids="empty text eps cut-jpeg cut-png corrupt large bomb flat".split(),
)
def test_bad_data_is_refused(refused, tmp_path: Path, data: bytes, word: str) -> None:
    with refused("read image", word):
        open_image(data)
    (tmp_path / "picture.png").write_bytes(data)
    with refused("read image", "picture.png"):
        Preprocessor.of(CLIP).pixel_values([tmp_path / "picture.png"])


def test_the_size_is_checked_before_anything_is_decoded(refused, monkeypatch) -> None:
    monkeypatch.setattr(image_file, "MAX_PIXELS", 24 * 17 - 1)
    monkeypatch.setattr(image_file, "_loaded", lambda *given, **named: pytest.fail("decoded"))
    for data in VALID.values():
        with refused("read image", "24 x 17", "over 407 pixels"):
            open_image(data)
    with refused("read image", "24 x 17"):
        open_image(Image.new("1", (24, 17)))


def test_a_path_without_a_file_is_refused(refused, tmp_path: Path) -> None:
    with refused("read image", "none.png", "does not exist"):
        open_image(tmp_path / "none.png")
    with refused("read image", "is not a file"):
        open_image(tmp_path)
    with refused("read image", "does not exist"):
        open_image("https://example.org/cat.png")
    with refused("read image", "cannot be read"):
        open_image("x" * 5000)
    with refused("read image"):
        open_image("a\0b")
    with refused("read image", "ndarray"):
        open_image(np.zeros((3, 4, 4), np.uint8))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_more_than_one_frame_is_refused(refused, kind: str) -> None:
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with refused("read image", "more than one frame"):
        open_image(file.getvalue())


def test_bad_images_of_pillow_are_refused(refused) -> None:
    preprocessor = Preprocessor.of(CLIP)
    with refused("read image", "0 x 5"):
        preprocessor.pixel_values([Image.new("RGB", (0, 5))])
    with refused("read image", "mode La"):
        preprocessor.pixel_values([Image.new("La", (5, 5))])
    with refused("read image", "cannot be decoded"):
        preprocessor.pixel_values([Image.open(BytesIO(VALID["JPEG"][:-300]))])
    with refused("read image", "1 x 9000", "2016000"):
        preprocessor.pixel_values([Image.new("RGB", (1, 9000))])
    with refused("read image", "mode L"):
        Preprocessor.of(CLIP | {"do_convert_rgb": False}).pixel_values([Image.new("L", (5, 5))])


def test_pictures_that_make_no_batch_are_refused(refused) -> None:
    preprocessor = Preprocessor.of(CLIP | {"do_center_crop": False})
    with refused("read image", "(224, 336)", "(224, 224)"):
        preprocessor.pixel_values([Image.new("RGB", (30, 20)), Image.new("RGB", (20, 20))])
    for nothing in ([], VALID["PNG"], "cat.png", Image.new("RGB", (4, 4))):
        with refused("read image", "no list of images"):
            preprocessor.pixel_values(nothing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no image_processor_type"),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "'Qwen2VLImageProcessor' is not known"),
        ({"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True}, "do_pan_and_scan"),
        ({"image_processor_type": "Gemma3ImageProcessor", "do_center_crop": True}, "do_center_crop"),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, "do_pad"),
        ({"image_processor_type": "SiglipImageProcessor", "do_center_crop": True}, "without crop_size"),
        (CLIP | {"do_flip": True}, "do_flip"),
        (CLIP | {"use_square_size": True}, "use_square_size"),
        (CLIP | {"auto_map": {"AutoImageProcessor": "code.Mine"}}, "auto_map"),
        (CLIP | {"size": {"longest_edge": 5}}, "size {'longest_edge': 5}"),
        (CLIP | {"size": {"shortest_edge": 5, "longest_edge": 9}}, "longest_edge"),
        (CLIP | {"size": {"height": 5, "width": 0}}, "size"),
        (CLIP | {"size": None}, "do_resize without size"),
        (CLIP | {"size": "224"}, "size is '224'"),
        (CLIP | {"size": -224}, "size -224"),
        (CLIP | {"crop_size": {"shortest_edge": 5}}, "crop_size"),
        (CLIP | {"resample": 6}, "resample"),
        (CLIP | {"resample": "bicubic"}, "resample"),
        (CLIP | {"do_resize": "yes"}, "do_resize"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]"),
        (CLIP | {"image_std": [0.5, 0.5, 0]}, "image_std is 0"),
        (CLIP | {"image_std": None}, "do_normalize without image_std"),
        (CLIP | {"rescale_factor": float("nan")}, "rescale_factor"),
    ],
)
def test_a_processor_we_cannot_follow_is_refused(refused, config: dict[str, Any], words: str) -> None:
    with refused("read image processor", words):
        Preprocessor.of(config)


@pytest.mark.parametrize("name", ["CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPImageProcessor"])
def test_one_processor_has_many_names(name: str) -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224, "size": 224}
    assert Preprocessor.of({"image_processor_type": name, "anything": [1]}) == Preprocessor.of(old)


def test_a_config_that_is_not_there_is_refused(refused, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "preprocessor_config.json"):
        with refused("read image processor", str(path)):
            Preprocessor.read(path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with refused("load bundle", "is not JSON"):
        Preprocessor.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert Preprocessor.read(tmp_path) == Preprocessor.of(CLIP)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata that it skips
@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.sampled_from(FORMATS))
def test_damaged_data_gives_a_picture_or_one_sentence(data, kind: str) -> None:
    damaged = bytearray(VALID[kind])
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.one_of(st.integers(0, 80), st.integers(0, len(damaged) - 1)))
        damaged[min(at, len(damaged) - 1)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    problem = None
    try:
        image = open_image(bytes(damaged[:cut]))
    except StillgraphError as error:
        problem = error
    if problem is None:
        assert (image.mode, min(image.size) > 0) == ("RGB", True)
    else:
        assert problem.stage == "read image"
        assert "\n" not in str(problem)


def test_the_runtime_alone_needs_no_pillow() -> None:
    program = "import stillgraph.session, stillgraph.cli, sys; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
