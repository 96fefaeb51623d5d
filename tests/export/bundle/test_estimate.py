"""What an export says that it will take, beside what it takes, and what it refuses for lack of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillgraph.exporter import streaming
from stillgraph.exporter.bundle import estimate as room
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.bundle.estimate import estimate
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import ExportConfig, request
from stillgraph.exporter.quantize.calibrate import products
from stillgraph.manifest import read
from stillgraph.spec import GraphShape

# Large enough that the pages which tensors begin at count for little.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
DECODE = [GraphShape(role="decode", max_len=1, ctx=40)]


def asked(checkpoint: Path, out: Path, precision: str = "fp32", **values: Any) -> ExportConfig:
    return request(model=str(checkpoint), target="portable", precision=precision, batch=1, out=out, **values)


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "int8"},
        {"precision": "int4", "block_size": 32},
        {"precision": "int4", "keep": ["lm_head=int4", "embed_tokens=int4", "down_proj=fp32"]},
    ],
)
def test_disk_is_what_the_weights_take(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, values: dict[str, Any]
) -> None:
    config = asked(tiny_checkpoint(**WIDE), tmp_path / "out", **values)
    found = estimate(config, open_checkpoint(config.model), DECODE)
    export(config, DECODE, replace=True, say=lambda line: None)
    assert found.disk == pytest.approx(read(config.place).weights.file.nbytes, rel=0.05)
    assert 0.5e9 < found.memory < 1e9
    assert 5 < found.seconds < 60


def test_a_calibration_takes_more_of_everything(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(**WIDE)
    plain, calibrated = (
        estimate(asked(checkpoint, tmp_path, "int4", calibrate=how), open_checkpoint(str(checkpoint)), DECODE)
        for how in ("none", "samples")
    )
    assert calibrated.disk > plain.disk
    assert calibrated.memory > plain.memory
    assert calibrated.seconds > plain.seconds


def test_weights_of_eight_bits_are_not_rounded_for_their_inputs(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint(**WIDE)
    monkeypatch.setattr(room, "speed", lambda: 1e6)
    few, half, many = (
        estimate(
            asked(checkpoint, tmp_path, "int4", calibrate="samples", budget=bits),
            open_checkpoint(str(checkpoint)),
            DECODE,
        )
        for bits in (4.5625, (4.5625 + 8.5) / 2, 8.5)  # of blocks of 64 with zero points, and without at int8
    )
    assert few.seconds > half.seconds > many.seconds
    assert half.seconds == pytest.approx((few.seconds + many.seconds) / 2, rel=1e-3)


def test_layers_stay_in_memory_while_samples_are_drawn_where_half_of_it_is_free(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(**WIDE)
    config, checkpoint = asked(folder, tmp_path, "int4", calibrate="samples"), open_checkpoint(str(folder))
    for other in ("BASE", "A_NUMBER", "A_LAYER", "HALVES"):
        monkeypatch.setattr(room, other, 0.0)
    layers = 4 * sum(math.prod(checkpoint.tensors[name].shape()) for name in products(checkpoint))
    found = []
    for free in (2 * layers - 1, 2 * layers):
        monkeypatch.setattr(streaming, "available_memory", lambda free=free: free)
        found.append((streaming.stay(layers // 4), estimate(config, checkpoint, DECODE).memory))
    assert [stays for stays, _ in found] == [False, True]
    assert [memory for _, memory in found] == [0, pytest.approx(room.DRAWING * layers)]


@pytest.mark.parametrize("lacking", ["disk", "memory"])
def test_without_room_nothing_is_begun(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    refused: Any,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    if lacking == "disk":
        monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    else:
        monkeypatch.setattr(room, "available_memory", lambda: 3e8)
    said = list[str]()
    words = {"disk": ["GB of disk", "0.00 GB"], "memory": ["0.5 GB of memory", "0.3 GB are free"]}
    with refused("export", *words[lacking]):
        export(asked(tiny_checkpoint(), tmp_path / "out"), DECODE, replace=True, say=said.append)
    assert not list(tmp_path.iterdir())
    assert said[-1].startswith("This takes about ")
    assert said[-1].endswith(".")
