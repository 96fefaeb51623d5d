"""An int4 export as a newcomer gets it: calibrated, proven, and the same numbers for both targets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from stillgraph.errors import CheckFailed
from stillgraph.exporter.bundle import calibration
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import decode_shape, prefill_shape, request
from stillgraph.exporter.precisions import PRECISIONS
from stillgraph.exporter.smoothing import shipped_smoothings
from stillgraph.exporter.validate.fake_quantize import stored_as
from stillgraph.exporter.validate.shipped import Shipped
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read

CTX = 24
FAST_KL = 5e-5  # nats; all 14 products of a tiny model cost more
FORM = {"block_size": 32, "budget": 7.5}  # rows of 48 fill up two blocks, at 6.8 bits a weight


def quietly(line: str) -> None:
    pass


@pytest.fixture(scope="session")
def calibrated(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decode graph of each target, of one checkpoint and its own samples."""
    folder, found = tmp_path_factory.mktemp("calibrated"), {}
    for target in ("portable", "onnxruntime"):
        values = {"model": str(tiny_checkpoint()), "target": target, "precision": "int4", "batch": 1}
        config = request(**values, calibrate="samples", **FORM, out=folder / target)
        export(config, [decode_shape(config, CTX)], replace=True, say=quietly)
        found[target] = config.place
    assert {path.name for path in folder.iterdir()} == set(found), "what a calibration left is gone"
    return found


def shipped(bundle: Path) -> dict[str, np.ndarray]:
    """The numbers of each quantized tensor of the checkpoint."""
    manifest = read(bundle)
    checkpoint = open_checkpoint(manifest.source.id).smoothed(shipped_smoothings(bundle, manifest))
    file, found = Shipped(bundle, manifest), {}
    for source, stored in stored_as(manifest, channels=False).items():
        above = sum(len(checkpoint.tensor(name)) for name in stored.sources[: stored.sources.index(source)])
        found[source] = file.rows(source, stored, above, checkpoint.tensor(source).numpy())
    return found


def test_both_targets_have_the_same_numbers(calibrated: dict[str, Path]) -> None:
    portable, own = (shipped(bundle) for bundle in calibrated.values())
    assert len(portable) == 2 * 7 + 1
    assert portable.keys() == own.keys()
    for name, numbers in own.items():
        np.testing.assert_array_equal(numbers, portable[name], err_msg=name)


def test_the_graph_has_the_weights_that_the_file_says(calibrated: dict[str, Path], tmp_path: Path) -> None:
    for target, made in calibrated.items():
        bundle = Path(shutil.copytree(made, tmp_path / target))
        parity = validate(bundle, depth="default", say=quietly)
        assert parity.passed
        assert max(c.worst.relative_error for c in parity.cases if not c.optimized) < 1e-5
        how = read(bundle).quantization
        assert how is not None
        assert (how.calibration, how.budget) == ("samples", 7.5)
        assert 0 < len(how.better) < 14


def test_weights_in_each_others_place_are_found(calibrated: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(calibrated["onnxruntime"], tmp_path / "bundle"))
    place = next(
        tensor
        for tensor in read(bundle).weights.tensors.values()
        if tensor.layout == "packed" and tensor.bits == 4
    )
    data = np.memmap(bundle / "weights.data", np.uint8, "r+")[place.offset : place.offset + place.nbytes]
    rows = data.reshape(place.shape[0], -1)
    rows[[0, 1]] = rows[[1, 0]]
    with pytest.raises(CheckFailed, match=r"row [01], block \d of .* as unrelated numbers"):
        validate(bundle, depth="quick", say=quietly)


def test_a_graph_added_later_finds_what_the_budget_gave(
    calibrated: dict[str, Path], tiny_checkpoint: Any, tmp_path: Path
) -> None:
    """It neither measures nor calibrates again: all weights are there."""
    place = Path(shutil.copytree(calibrated["portable"], tmp_path / "bundle"))
    before = read(place)
    values = {"model": str(tiny_checkpoint()), "target": "portable", "precision": "int4", "batch": 1}
    config = request(**values, calibrate="samples", **FORM, out=place)
    said: list[str] = []
    export(config, [decode_shape(config, CTX)], replace=False, say=said.append)
    assert read(place).quantization == before.quantization
    assert read(place).weights == before.weights
    assert not [line for line in said if "calibrat" in line or "measuring" in line]


def test_a_fast_prefill_leaves_in_blocks_what_it_would_round_too_coarsely(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], fast_kl=FAST_KL))
    values = {"model": str(tiny_checkpoint()), "target": "onnxruntime", "precision": "int8", "batch": 1}
    how = {"block_size": 32, "fast_prefill": True, "calibrate": "samples"}
    config = request(**values, **how, out=tmp_path / "bundle")
    shapes = [prefill_shape(config, 8, CTX), decode_shape(config, CTX)]
    export(config, shapes, replace=True, say=quietly)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"], "what the measuring left is gone"
    manifest = read(config.place)
    quantization = manifest.quantization
    assert quantization is not None
    assert 3 < len(quantization.blocked) < 14 - 3
    graph = onnx.load(config.place / "prefill-8-int8.onnx", load_external_data=False).graph
    read_by = {
        op: {
            source.removesuffix(".weight")
            for node in graph.node
            if node.op_type == op
            for source in manifest.weights.tensors[node.input[1]].sources
        }
        for op in ("MatMulNBits", "MatMulIntegerToFloat")
    }
    assert read_by["MatMulNBits"] == {*quantization.blocked, "model.embed_tokens"}, "the head has one token"
    assert len(read_by["MatMulIntegerToFloat"]) == 14 - len(quantization.blocked)
    parity = validate(config.place, depth="default", say=quietly)
    assert parity.passed
    export(config, shapes[:1], replace=False, say=quietly)
    assert read(config.place).quantization == quantization


def test_what_is_dear_for_a_short_prompt_alone_stays_in_blocks(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs of a text's first token may be far larger than others, and the mean over a text hides them."""
    real = calibration.sensitivity
    dear, also = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"

    def costs(checkpoint: Any, kinds: Any, ids: Any, say: Any) -> list[list[Any]]:
        """Of kinds: int8 a token; over short prompts blocks as well, which cost another product as much."""
        short = ids.shape[1] == calibration.START
        given = [(f"{dear}.weight", f"{also}.weight"), (f"{also}.weight",)]
        return [
            [replace(cost, nats=1.0 if short and cost.name in given[kind] else 0.0) for cost in found]
            for kind, found in enumerate(real(checkpoint, kinds, ids, say))
        ]

    monkeypatch.setattr(calibration, "sensitivity", costs)
    values = {"model": str(tiny_checkpoint()), "target": "onnxruntime", "precision": "int8", "batch": 1}
    how = {"block_size": 32, "fast_prefill": True, "calibrate": "samples"}
    config = request(**values, **how, out=tmp_path / "bundle")
    export(config, [prefill_shape(config, 8, CTX)], replace=True, say=quietly)
    quantization = read(config.place).quantization
    assert quantization is not None
    assert quantization.blocked == (dear,)
