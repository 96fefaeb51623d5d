"""What int4 is calibrated with: texts, and files that are none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from stillgraph.exporter.config import request

Refused = Callable[..., AbstractContextManager[None]]
VALUES: dict[str, Any] = {"model": "demo", "target": "portable", "precision": "fp32", "batch": 1, "out": None}
INT4: dict[str, Any] = {"precision": "int4"}
LINES = "A line of a text that says something.\n"
NO_TEXTS: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "none there": (None, ("no such file",)),
    "nothing": (b"", ("0 bytes", "4096")),
    "a line": (LINES.encode(), ("38 bytes", "4096")),
    "a picture": (b"\x89PNG\r\n\x1a\n" * 999, ("is no text", "byte 0 is not UTF-8")),
    "numbers": (bytes(range(32)) * 999, ("is no text", "unprintable")),
    "another encoding": (("\u00e4" * 9999).encode("utf-16"), ("is no text", "not UTF-8")),
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_a_file_that_nothing_can_be_calibrated_with(refused: Refused, tmp_path: Path, kind: str) -> None:
    content, words = NO_TEXTS[kind]
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with refused("calibrate", f"--calibrate {path}", *words, "leave --calibrate out"):
        request(**VALUES | INT4 | {"calibrate": str(path)})


def test_a_folder_is_no_text(refused: Refused, tmp_path: Path) -> None:
    with refused("calibrate", f"--calibrate {tmp_path}", "directory"):
        request(**VALUES | INT4 | {"calibrate": str(tmp_path)})


@pytest.mark.parametrize(
    ("budget", "form", "said"),
    [
        (4.5, {}, "--budget 4.5 is under the 4.562 bits that blocks of 64 with scales and zero points take"),
        (
            4.49,
            {"asymmetric": False},
            "--budget 4.49 is under the 4.5 bits that blocks of 64 with scales take",
        ),
        (5.1, {"block_size": 32}, "--budget 5.1 is under the 5.125 bits that blocks of 32"),
    ],
)
def test_a_budget_that_nothing_fits_into_is_told(budget, form, said, refused) -> None:
    with refused("export", said):
        request(**VALUES | INT4 | form | {"budget": budget, "calibrate": "samples"})
    found = request(**VALUES | INT4 | form | {"budget": budget + 0.1, "calibrate": "samples"})
    assert found.quantization.budget == budget + 0.1


@pytest.mark.parametrize(
    ("how", "refine"),
    [
        ({}, 1024),
        ({"keep": ["down_proj=int8"]}, 1024),
        ({"keep": ["lm_head=int8"]}, 0),  # asked for: all of its tokens have them
        ({"target": "portable"}, 0),
        ({"precision": "int8"}, 0),
    ],
)
def test_a_head_of_int4_is_refined_where_no_precision_is_given_for_it(
    how: dict[str, Any], refine: int
) -> None:
    config = request(**VALUES | INT4 | {"target": "onnxruntime"} | how)
    assert config.quantization is not None
    assert config.quantization.refine == refine


def test_what_int4_is_calibrated_with(tmp_path: Path) -> None:
    text = LINES * 200
    (tmp_path / "text").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    for option, found in (("none", None), ("samples", "samples"), (str(tmp_path / "text"), digest)):
        config = request(**VALUES | INT4 | {"calibrate": option})
        assert config.quantization is not None
        assert config.quantization.calibration == found
        assert config.quantization.budget == (found and 6.4)
    eight = request(**VALUES | {"precision": "int8", "calibrate": "samples"}).quantization
    assert eight is not None
    assert eight.calibration is None
