"""Bundles of other formats: refused in one sentence that says how to get one that is understood."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from stillgraph.errors import StillgraphError
from stillgraph.manifest import FORMAT_VERSION, read
from stillgraph.remake import remaking_command

NAMES = {1: ("slots", "quantisation"), 2: ("slots", "quantisation"), 3: ("max_len", "quantization")}
NAMES[4] = NAMES[3]


def old(version: int, roles: tuple[str, ...] = ("prefill", "decode"), **changes: Any) -> dict[str, Any]:
    """What manifests of a format had of the values that matter here."""
    max_len, _ = NAMES[version]
    sizes = {"prefill": 64, "decode": 1, "dynamic": 512, "vision": 16}
    graphs = {
        role: {
            "shape": {
                "role": role,
                "batch": 2,
                max_len: sizes[role],
                "ctx": None if role == "vision" else 512,
            }
        }
        for role in roles
    }
    source = {"id": "google/gemma-3-1b-it", "model_type": "gemma3_text", "checkpoint_sha256": "0" * 64}
    raw = {"format_version": version, "source": source, "target": "onnxruntime", "precision": "int8"}
    return raw | {"graphs": graphs} | changes


def quantized(version: int) -> dict[str, Any]:
    how = {"block_size": 32, "symmetric": False, "keep": {"lm_head": "int8", "layers.[0-3]": "fp32"}}
    return old(version, **{NAMES[version][1]: how | {"fast_prefill": True}})


def four_bits(**how: Any) -> dict[str, Any]:
    form = {"block_size": 64, "symmetric": False, "keep": {"lm_head": "int8"}, "fast_prefill": False}
    return old(4, precision="int4", quantization=form | {"calibration": "samples", "budget": 6.4} | how)


START = ["stillgraph", "export", "bundle", "-m", "google/gemma-3-1b-it"]
SIZES = ["--max-len", "64", "--batch", "2", "--ctx", "512"]
STORED = ["--target", "onnxruntime", "--precision", "int8"]
FOUR = [*STORED[:3], "int4"]
FORM = ["--block-size", "32", "--asymmetric"]
KEPT = ["--keep", "lm_head=int8", "--keep", "layers.[0-3]=fp32"]
CASES: list[tuple[dict[str, Any], list[str]]] = [
    (old(1, block_size=32), [*START, *SIZES, *STORED, *FORM[:2]]),
    (quantized(2), [*START, *SIZES, *STORED, *FORM, *KEPT, "--fast-prefill"]),
    (quantized(3), [*START, *SIZES, *STORED, *FORM, *KEPT, "--fast-prefill"]),
    (
        quantized(3) | {"quantisation": {"block_size": 64}},
        [*START, *SIZES, *STORED, *FORM, *KEPT, "--fast-prefill"],
    ),
    (four_bits(), [*START, *SIZES, *FOUR, "--block-size", "64", *KEPT[:2]]),
    (
        four_bits(calibration=None, budget=None, symmetric=True, block_size=128),
        [*START, *SIZES, *FOUR, "--block-size", "128", "--symmetric", "--calibrate", "none", *KEPT[:2]],
    ),
    (
        four_bits(calibration="0" * 64, budget=4.5),
        [*START, *SIZES, *FOUR, "--block-size", "64", "--calibrate", "FILE", "--budget", "4.5", *KEPT[:2]],
    ),
    (four_bits(refine=1024), [*START, *SIZES, *FOUR, "--block-size", "64"]),
    (
        four_bits(budget=None, kl=0.05),
        [*START, *SIZES, *FOUR, "--block-size", "64", "--kl", "0.05", *KEPT[:2]],
    ),
    (
        old(4, quantization={"block_size": 128, "symmetric": True, "calibration": None}),
        [*START, *SIZES, *STORED, "--block-size", "128"],
    ),
    (old(3, block_size=128), [*START, *SIZES, *STORED]),
    (old(3, ("vision", "prefill", "decode")), [*START, *SIZES, *STORED]),
    (old(3, ("dynamic",)), ["stillgraph", "export", "dynamic", *START[3:], "--ctx", "512"]),
    (old(3, graphs={}, target="portable", precision="fp32", source={"id": "demo"}), [*START[:4], "demo"]),
    ({"format_version": 2}, START[:3]),
    ({"format_version": 1, "source": 7, "graphs": [1], "precision": None, "quantisation": "x"}, START[:3]),
    ({"format_version": 3, "graphs": {"decode": {"shape": 4}}, "quantization": {"keep": []}}, START[:3]),
]


@pytest.mark.parametrize(("raw", "words"), CASES)
def test_an_old_bundle_is_told_the_command_that_makes_it_anew(
    tmp_path: Path, raw: dict[str, Any], words: list[str]
) -> None:
    bundle = tmp_path / "a bundle"
    bundle.mkdir()
    (bundle / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(StillgraphError) as caught:
        read(bundle)
    error = caught.value
    assert error.exit_code == 2
    assert (
        f"format version {raw['format_version']} and this stillgraph understands {FORMAT_VERSION}"
        in error.problem
    )
    command = error.remedy.removeprefix("make it anew with `").removesuffix("`")
    assert shlex.split(command) == [*words, "--out", str(bundle)]
    assert "\n" not in str(error)


def test_the_command_is_one_that_the_export_has() -> None:
    """Every option of the longest command is parsed by the command line, up to a checkpoint that is none."""
    from typer.testing import CliRunner

    from stillgraph.exporter.cli import app

    words = shlex.split(remaking_command(quantized(3) | {"source": {"id": "./nowhere"}}, Path("out")))
    done = CliRunner().invoke(app, words[2:])
    assert isinstance(done.exception, StillgraphError), done.output
    assert "./nowhere" in str(done.exception)


def test_a_newer_bundle_asks_for_a_newer_stillgraph(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 6}')
    with pytest.raises(
        StillgraphError, match=r"version 6 and this stillgraph understands 5; upgrade with 'pip"
    ):
        read(tmp_path)


@pytest.mark.parametrize("version", [None, "4", 0, True, 3.5, [4]])
def test_what_is_no_version_is_refused_too(tmp_path: Path, version: Any) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": version}))
    with pytest.raises(StillgraphError, match=r"format version .*; export the bundle again"):
        read(tmp_path)
