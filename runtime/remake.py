"""The command that makes a bundle anew which an older stillgraph made, from what its manifest says."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What is left out of the command, because an export takes it anyway.
DEFAULTS = {"--target": "portable", "--precision": "fp32", "--batch": 1, "--budget": 6.4}
DEFAULTS |= {"--max-len": 128, "--ctx": 1024}
OLD_BLOCK_SIZE = 128  # the default before format 4: who took it gets today's


def remaking_command(raw: Mapping[str, Any], bundle: Path) -> str:
    """The `stillgraph export` of a manifest of an older format, whatever it lacks."""
    shapes = [_dict(_dict(graph).get("shape")) for graph in _dict(raw.get("graphs")).values()]
    roles = {str(shape.get("role")) for shape in shapes}
    what = "dynamic" if "dynamic" in roles else "bundle"
    words = ["stillgraph", "export", what]
    if isinstance(model := _dict(raw.get("source")).get("id"), str):
        words += ["-m", model]
    options = dict(_sizes(shapes, what))
    if what == "bundle":
        options |= _storage(raw)
    for option, value in options.items():
        if isinstance(value, list):
            words += [word for each in value for word in (option, each)]
        elif value is True:
            words.append(option)
        elif value not in (None, False, DEFAULTS.get(option)):
            words += [option, str(value)]
    return shlex.join([*words, "--out", str(bundle)])


def _storage(raw: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are stored. Format 1 had a block size alone; format 2 had another spelling.

    Since format 4 a manifest says what four bits were calibrated with, a text by its hash; since then zero
    points are the default of int4, and the block size is one of the precision.
    """
    how = _dict(raw.get("quantization") or raw.get("quantisation"))
    keep = _dict(how.get("keep"))
    if how.get("refine"):  # it is given up for a precision that is asked for
        keep = {pattern: precision for pattern, precision in keep.items() if pattern != "lm_head"}
    size = how.get("block_size", raw.get("block_size"))
    four = "calibration" in how and raw.get("precision") == "int4"
    return {
        "--target": raw.get("target"),
        "--precision": raw.get("precision"),
        "--block-size": size if "calibration" in how or size != OLD_BLOCK_SIZE else None,
        "--asymmetric": how.get("symmetric") is False and not four,
        "--symmetric": how.get("symmetric") is True and four,
        "--calibrate": _calibrate(how["calibration"]) if four else None,
        "--budget": how.get("budget"),
        "--kl": how.get("kl"),
        "--keep": [f"{pattern}={precision}" for pattern, precision in keep.items()],
        "--fast-prefill": how.get("fast_prefill") is True,
    }


def _calibrate(calibration: object) -> str | None:
    return "none" if calibration is None else None if calibration == "samples" else "FILE"


def _sizes(shapes: Sequence[Mapping[str, Any]], what: str) -> Iterator[tuple[str, Any]]:
    """max_len was called slots at first."""
    prefill = next((shape for shape in shapes if shape.get("role") == "prefill"), {})
    if what == "bundle":
        yield "--max-len", prefill.get("max_len", prefill.get("slots"))
        yield "--batch", next((shape.get("batch") for shape in shapes if shape.get("role") == "decode"), None)
    yield "--ctx", next((shape["ctx"] for shape in shapes if shape.get("ctx")), None)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
