"""A shipped bundle answers golden.json through its own driver, and a wrong one is not shipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import stillgraph
from stillgraph.archive import unpack
from stillgraph.errors import CheckFailed
from stillgraph.exporter.ir.simplify import same_outputs
from stillgraph.exporter.ship import table, triton
from stillgraph.exporter.ship.cache_write import rewrite_cache_write
from stillgraph.exporter.ship.environments import missing, python
from stillgraph.exporter.ship.runtimes import Runtime, runtimes
from stillgraph.exporter.ship.ship import ship
from stillgraph.files import check_files
from stillgraph.golden import GOLDEN
from stillgraph.manifest import read
from tests.export.ship.conftest import proven_copy

Bundle = Callable[..., Path]


def silent(_: str) -> None:
    """No progress."""


def shipped(bundle: Path, name: str, place: Path) -> Any:
    if python(name) is None:
        pytest.skip(missing(name))
    return ship(bundle, runtimes()[name], place, silent)


@pytest.mark.parametrize("name", ["ort", "openvino", "mnn", "iree"])
def test_every_case_is_equal(name: str, seeing: Path, tmp_path: Path) -> None:
    """A picture's too. The archive is the same bytes again."""
    assert "picture" in (seeing / GOLDEN).read_text()
    found = shipped(seeing, name, tmp_path / "one")
    checked = found.checked
    assert (checked.cases, checked.equal, checked.problems, checked.reason) == (5, 5, (), None)
    assert 0 < checked.worst < (1e-4 if name == "iree" else 1e-5)
    assert checked.versions
    check_files(found.folder, read(found.folder), hashes=True)
    unpack(found.archive, tmp_path / "unpacked")
    assert not [*(tmp_path / "unpacked").rglob("*.pyc")]
    with stillgraph.load(tmp_path / "unpacked") as engine:
        assert list(engine.stream([2], max_new_tokens=1))
    again = shipped(seeing, name, tmp_path / "two")
    assert found.archive.read_bytes() == again.archive.read_bytes()


def test_a_text_that_ends_by_itself(proven: Path, tmp_path: Path) -> None:
    """The loop of all drivers in Python is the same."""
    assert '"stops"' in (proven / GOLDEN).read_text()
    checked = shipped(proven, "ort", tmp_path / "one").checked
    assert (checked.cases, checked.equal, checked.problems) == (5, 5, ())


@pytest.fixture
def node(tmp_path: Path) -> Runtime:
    runtime = runtimes()["node"]
    if isinstance(reason := runtime.command(tmp_path), str):
        pytest.skip(reason)
    return runtime


def test_node_gives_every_text(node: Runtime, proven: Path, seeing: Path, tmp_path: Path) -> None:
    found = ship(proven, node, tmp_path / "one", silent)
    assert (found.checked.cases, found.checked.equal, found.checked.skipped) == (5, 5, ())
    assert 0 < found.checked.worst < 1e-5
    unpack(found.archive, tmp_path / "unpacked")
    assert ship(proven, node, tmp_path / "two", silent).archive.read_bytes() == found.archive.read_bytes()
    seen = ship(seeing, node, tmp_path / "seeing", silent).checked
    assert (seen.equal, seen.skipped) == (seen.cases, ())


def test_a_browser_gives_every_text(proven: Path, seeing: Path, tmp_path: Path) -> None:
    web = runtimes()["web"]
    for reason in (web.refuses(read(proven)), web.command(tmp_path)):
        if isinstance(reason, str):
            pytest.skip(reason)
    found = ship(proven, web, tmp_path / "one", silent)
    assert (found.checked.cases, found.checked.equal, found.checked.skipped) == (5, 5, ())
    assert 0 < found.checked.worst < 1e-5
    unpack(found.archive, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "packages").is_dir()
    seen = ship(seeing, web, tmp_path / "seeing", silent).checked
    assert (seen.equal, seen.skipped) == (seen.cases, ())


def test_a_table_has_a_row_for_what_ran_and_for_what_did_not(
    proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent(type(runtimes()["ort"])):  # type: ignore[misc]
        def command(self, folder: Path) -> str:
            return "it is not here"

    class Other(Absent):
        def refuses(self, manifest: Any) -> str:
            return "it is another"

    known = {"a": Absent("ort", "A"), "b": runtimes()["ort"], "c": Other("ort", "C")}
    monkeypatch.setattr(table, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(table, "runtimes", lambda: known)
    shutil.copytree(proven, tmp_path / "fp32")
    absent, ran, other = table.rows(tmp_path)
    assert absent[3:] == ["not run: it is not here", "", "", "", ""]
    assert ran[0].startswith("ONNX Runtime 1.")
    assert ran[2:4] == ["fp32", "5 of 5"]
    assert all(float(cell) > 0 for cell in (ran[1], *ran[4:]))
    assert "it is another" in other[3]
    lines = table.markdown([absent, ran, other]).splitlines()
    assert {line.count("|") for line in lines[2:] if line} == {len(ran) + 1}


def test_without_packages_nothing_passes(
    proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLGRAPH_ENVIRONMENTS", str(tmp_path / "none"))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    checked = ship(proven, runtimes()["node"], tmp_path / "out", silent).checked
    assert str(checked.reason).startswith("its packages of npm are not installed: python -m ")
    assert (checked.cases, checked.equal) == (0, 0)
    assert "not installed" in str(runtimes()["web"].refuses(read(proven)))


def test_a_wrong_text_is_not_shipped(proven: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(proven, tmp_path / "own"))
    manifest = read(own)
    weights = np.memmap(own / manifest.weights.file.path, np.float32, "r+")
    weights[:: len(weights) // 200] *= -3
    weights.flush()
    with pytest.raises(CheckFailed, match=r"differs from golden.json: one_token: "):
        ship(own, runtimes()["ort"], tmp_path / "out", silent)
    assert {path.name for path in tmp_path.iterdir()} == {"own"}


def test_a_where_writes_what_a_scatter_writes(proven: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(proven, tmp_path / "own"))
    manifest = read(own)
    changed = rewrite_cache_write(own, manifest, "Where")
    before, after = manifest.graph("decode"), changed.graph("decode")
    assert before is not None
    assert after is not None
    ops = [
        {node.op_type for node in onnx.load(place / before.file.path, load_external_data=False).graph.node}
        for place in (proven, own)
    ]
    assert "ScatterElements" in ops[0]
    assert "ScatterElements" not in ops[1]
    assert "Where" in ops[1]
    assert same_outputs(proven / before.file.path, own / after.file.path, before.aliases) == 0
    check_files(own, changed, hashes=True)


def test_an_npu_is_told_its_chip(proven: Path, tmp_path: Path, refused: Callable[..., Any]) -> None:
    runtime = runtimes()["qnn"].for_chip("sm8750")
    runtime.fill(tmp_path, read(proven), silent)
    assert json.loads((tmp_path / "chip.json").read_text()) == {
        "name": "sm8750",
        "soc_model": "69",
        "htp_arch": "79",
    }
    with refused("ship", "--soc x1 is not known", "sm8650"):
        runtimes()["qnn"].for_chip("x1")
    with refused("ship", "--soc does nothing with --for ort"):
        runtimes()["ort"].for_chip("sm8750")


def test_an_npu_has_weights_of_few_bits_as_numbers(
    tiny_bundle: Bundle, tmp_path: Path, refused: Callable[..., Any]
) -> None:
    """All that is left for its compiler to fold: every DequantizeLinear reads constants."""
    own = proven_copy(tiny_bundle(precision="int8"), tmp_path / "own")
    before = read(own)
    manifest = runtimes()["qnn"].fill(own, before, silent)
    for name, entry in manifest.graphs.items():
        assert entry.file != before.graphs[name].file
        graph = onnx.load(own / entry.file.path, load_external_data=False).graph
        constants = {value.name for value in graph.initializer}
        found = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert found
        assert all(set(node.input) <= constants for node in found)
        read_by = {name for node in graph.node for name in node.input} | {
            value.name for value in graph.output
        }
        assert all(read_by & set(node.output) for node in graph.node), "the NPU refuses what nothing reads"
    fours = proven_copy(tiny_bundle(precision="int4"), tmp_path / "fours")
    with refused("ship", "embedding has 4 bits", "--keep embed_tokens=int8"):
        ship(fours, runtimes()["qnn"], tmp_path / "out", silent)


def test_triton_takes_each_config(proven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(proven, "triton", tmp_path / "one")
    assert "container" in str(found.checked.reason)
    assert found.checked.equal == 0
    manifest = read(proven)
    for name, entry in manifest.graphs.items():
        model = found.folder / "models" / name
        graph = onnx.load(model / "1" / "model.onnx", load_external_data=False).graph
        text = (model / "config.pbtxt").read_text()
        assert f'name: "{name}"' in text
        assert (
            text.count("TYPE_") == len(graph.input) + len(graph.output) == len(entry.inputs + entry.outputs)
        )
        assert (model / "1" / "weights.data").samefile(found.folder / "weights.data")
    written = triton.config(entry)
    for wrong, said in ((written.replace("[1, 1]", "[1, 2]", 1), "other"), (f"{written}kind: 7", "is none")):
        assert wrong != written
        monkeypatch.setattr(triton, "config", lambda entry, wrong=wrong: wrong)
        with pytest.raises(CheckFailed, match=said):
            ship(proven, runtimes()["triton"], tmp_path / "two", silent)
    assert not (tmp_path / "two").exists()


def test_a_cpu_that_iree_does_not_know_is_told(
    proven: Path, tmp_path: Path, refused: Callable[..., Any]
) -> None:
    if python("iree") is None:
        pytest.skip(missing("iree"))
    with refused("ship", "for the CPU nosuch", "--soc"):
        ship(proven, runtimes()["iree"].for_chip("nosuch"), tmp_path / "out", silent)
    assert not list(tmp_path.iterdir())


def test_without_a_converter_nothing_is_written(
    proven: Path, tmp_path: Path, refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLGRAPH_ENVIRONMENTS", str(tmp_path / "none"))
    with refused("ship", "MNN is not installed", "run that command"):
        ship(proven, runtimes()["mnn"], tmp_path / "out", silent)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_shipped_is_told(
    proven: Path, tiny_bundle: Bundle, tmp_path: Path, refused: Callable[..., Any]
) -> None:
    with refused("ship", "has no golden.json"):
        ship(tiny_bundle(), runtimes()["ort"], tmp_path / "out", silent)
    fused = Path(shutil.copytree(proven, tmp_path / "fused"))
    manifest = read(fused).model_copy(update={"target": "onnxruntime"})
    (fused / "manifest.json").write_text(manifest.to_json())
    with refused("ship", "cannot be shipped for OpenVINO", "onnxruntime"):
        ship(fused, runtimes()["openvino"], tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()
