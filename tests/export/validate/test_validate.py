"""The proof itself: it runs every edge, passes what is right, and fails what is wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from stillgraph.errors import StillgraphError
from stillgraph.exporter.validate.cases import edges, make_plans, positions
from stillgraph.exporter.validate.gates import gate
from stillgraph.exporter.validate.metrics import cache_error, compare
from stillgraph.exporter.validate.validate import validate
from stillgraph.files import sha256
from stillgraph.manifest import MANIFEST, File, Manifest, read

Bundle = Callable[..., Path]
WINDOW = 5  # of the tiny checkpoints


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture
def copied(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle of one's own, to validate or to spoil."""
    return Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))


def only(bundle: Path, role: str) -> Manifest:
    """The bundle's manifest with the graph of one role."""
    manifest = read(bundle)
    graphs = {name: graph for name, graph in manifest.graphs.items() if graph.shape.role == role}
    return manifest.model_copy(update={"graphs": graphs})


def test_edges_are_those_where_static_graphs_break(tiny_bundle: Bundle) -> None:
    # P = 16, ctx = 40, W = 5: 1, 2, W-1, W, W+1, P-1, P, P+1, 2P+1, ctx-1.
    assert list(edges(read(tiny_bundle()))) == [1, 2, 4, 5, 6, 15, 16, 17, 33, 39]


def test_edges_of_a_decode_alone(tiny_bundle: Bundle) -> None:
    assert list(edges(only(tiny_bundle(), "decode"))) == [1, 2, 4, 5, 6, 39]


def test_edges_of_a_prefill_alone_end_at_its_max_len(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle(shapes=[("prefill", 16, None), ("decode", 1, 40)])
    assert list(edges(only(bundle, "prefill"))) == [1, 2, 4, 5, 6, 15, 16]


def test_a_walk_reaches_the_last_slot(tiny_bundle: Bundle) -> None:
    manifest = read(tiny_bundle())
    walked = [positions(manifest, plan) for plan in make_plans(manifest, "default") if plan.walks]
    assert walked
    assert all(set(range(15, 40)) <= found for found in walked)


def test_comparison_measures() -> None:
    found = compare(0, 7, np.array([1.0, -4.0, 2.0]), np.array([1.0, -4.0, 0.0]))
    assert (found.position, found.max_error, found.top1_equal) == (7, 2.0, False)
    assert found.mean_error == pytest.approx(2 / 3)
    assert found.relative_error == pytest.approx(0.5)
    before, after = (np.exp(x) / np.exp(x).sum() for x in (np.array([1.0, -4, 2]), np.array([1.0, -4, 0])))
    assert found.kl == pytest.approx(float(np.sum(before * np.log(before / after))))
    assert cache_error(np.array([[2.0, -8.0]]), np.array([[2.0, -6.0]])) == pytest.approx(0.25)


def test_fp16_bound_is_the_one_stated(tiny_bundle: Bundle) -> None:
    held = gate(read(tiny_bundle()).model, "fp16")
    assert held.kind == "worst"
    assert held.value == pytest.approx(2 * 2**-11 * math.sqrt(21 * 2))


def test_a_right_bundle_passes_and_says_so(copied: Path) -> None:
    parity = validate(copied, depth="default", say=silent)
    assert parity.passed
    assert parity.top1_agreement == 1.0
    assert 0 < parity.max_relative_error < 1e-5
    assert parity.max_cache_error < 1e-5
    assert 0 < parity.worst_ratio < 1
    assert {(case.text, case.optimized) for case in parity.cases} == {
        ("random", False), ("random", True), ("text", False), ("text", True),
    }  # fmt: skip
    assert max(c.position for case in parity.cases for c in case.comparisons) == 39
    assert read(copied).validation == parity.validation()
    page = (copied / "reports/parity.html").read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "src=" not in page


@pytest.mark.parametrize("shapes", [[("prefill", 16, None), ("decode", 1, 40)], [("prefill", 16, None)]])
def test_other_kinds_of_bundle_pass(tiny_bundle: Bundle, tmp_path: Path, shapes: list[Any]) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(shapes=shapes), tmp_path / "bundle"))
    parity = validate(bundle, depth="quick", say=silent)
    assert parity.passed
    assert {case.start for case in parity.cases} == (
        {"prefill", "reference cache"} if shapes[1:] else {"prefill"}
    )


def test_rows_of_different_lengths_pass(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle(batch=3), tmp_path / "bundle"))
    parity = validate(bundle, depth="quick", say=silent)
    assert parity.passed
    assert {c.row for case in parity.cases for c in case.comparisons} == {0, 1, 2}


def respoil(bundle: Path, name: str, spoil: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph of a bundle, and its hash in the manifest."""
    manifest = read(bundle)
    entry = manifest.graphs[name]
    path = bundle / entry.file.path
    proto = onnx.load(path, load_external_data=False)
    spoil(proto)
    onnx.save(proto, path)
    file = File(path=entry.file.path, nbytes=path.stat().st_size, sha256=sha256(path))
    graphs = manifest.graphs | {name: entry.model_copy(update={"file": file})}
    (bundle / MANIFEST).write_text(manifest.model_copy(update={"graphs": graphs}).to_json())


def widen_window(proto: onnx.ModelProto) -> None:
    """The classic mistake: a window of W + 1."""
    scalars = [t for t in proto.graph.initializer if not t.dims or list(t.dims) == [1]]
    windows = [t for t in scalars if t.data_type == onnx.TensorProto.INT64
               and numpy_helper.to_array(t).item() == WINDOW]  # fmt: skip
    assert len(windows) == 1
    windows[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(windows[0]) + 1, windows[0].name))


@pytest.mark.parametrize("name", ["prefill-16", "decode-40"])
def test_a_window_off_by_one_fails(copied: Path, name: str) -> None:
    respoil(copied, name, widen_window)
    parity = validate(copied, depth="quick", say=silent)
    assert not parity.passed
    assert not read(copied).validation.passed
    broken = {case.prompt for case in parity.cases if not parity.within_bound(case)}
    assert 39 in broken
    assert 1 not in broken  # short prompts look fine: the edges are what finds it


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_one_spoiled_weight_fails(copied: Path, value: float) -> None:
    place = read(copied).weights.tensors["model.norm.weight.add"]
    with (copied / "weights.data").open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(np.float32(value).tobytes())
    assert not validate(copied, depth="quick", say=silent).passed
    assert read(copied).validation is not None


def test_another_checkpoint_is_refused(copied: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(StillgraphError, match=r"is not the checkpoint that .* was made from"):
        validate(copied, model=str(tiny_checkpoint(seed=9)), depth="quick", say=silent)
