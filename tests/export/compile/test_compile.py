"""What compile writes: graphs that share one file of packed weights, whole or not at all, and proven."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from stillgraph.compiled import COMPILED, DESCRIPTION, Compiled, find, seal, set_options
from stillgraph.cpu import cpu_name
from stillgraph.errors import CheckFailed
from stillgraph.exporter.compile import compile as compiling
from stillgraph.exporter.compile.check import compare
from stillgraph.exporter.compile.compile import compile_bundle
from stillgraph.exporter.compile.prepacked import PackedFile, external
from stillgraph.files import check_files, sha256
from stillgraph.manifest import MANIFEST, File, read

Refused = Callable[..., AbstractContextManager[None]]
Bundle = Callable[..., Path]


def silent(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def graphs(bundle: Path, compiled: Compiled) -> list[onnx.ModelProto]:
    return [onnx.load(bundle / graph.file.path, load_external_data=False) for graph in compiled.graphs]


def places(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {t.name: external(t) for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}


def test_both_graphs_have_one_copy_of_the_packed_weights(quantized: Path) -> None:
    compiled = compile_bundle(quantized, silent)
    assert compiled.packed
    assert compiled.data is not None
    prefill, decode = [places(model) for model in graphs(quantized, compiled)]
    assert prefill == decode
    of_the_bundle = {
        name: entries for name, entries in prefill.items() if entries["location"] == "weights.data"
    }
    # The table lies where the bundle has it, though the head, of the same bytes, is packed.
    assert {"scale", "table", "up_scales"} - of_the_bundle.keys() == set()
    packed = {name: entries for name, entries in prefill.items() if entries["location"] == compiled.data.path}
    assert packed.keys() == {"up", "gate", "head"}
    for entries in packed.values():
        blob = entries["prepacked_0"].split("|")[1].split(";")
        assert int(entries["offset"]) % 4096 == int(blob[0]) % 4096 == 0
    # Each of the three as it is and packed, once: two graphs with a copy each would have twice this.
    blobs = sum(int(e["length"]) + int(e["prepacked_0"].split(";")[1]) for e in packed.values())
    assert blobs <= compiled.data.nbytes < blobs + 6 * 4096


def test_the_largest_packed_weight_comes_first(quantized: Path) -> None:
    """The order in which ONNX Runtime packs; the file had the products in another one."""
    for model in graphs(quantized, compile_bundle(quantized, silent)):
        assert model.graph.node[0].input[1] in ("up", "gate")
        assert len({node.name or node.output[0] for node in model.graph.node}) == len(model.graph.node)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sessions_map_the_file(quantized: Path) -> None:
    compiled = compile_bundle(quantized, silent)
    assert compiled.data is not None
    path = str((quantized / compiled.data.path).resolve())
    sessions = []
    for count, graph in enumerate(compiled.graphs, 1):
        options = ort.SessionOptions()
        set_options(options, quantized, compiled.packed)
        sessions.append(ort.InferenceSession(str(quantized / graph.file.path), options))
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
        assert len(mapped) == 3 * count  # the packed weights; what they were packed from is unmapped again


@pytest.mark.parametrize("pack", [False, True])
def test_fp32_is_packed_on_request_only(floats: Path, pack: bool) -> None:
    compiled = compile_bundle(floats, silent, pack_fp32=pack)
    assert compiled.packed is pack
    assert [graph.worst_difference for graph in compiled.graphs] == [0.0, 0.0]  # the same kernels
    where = {name: entries["location"] for name, entries in places(graphs(floats, compiled)[0]).items()}
    assert where["table"] == "weights.data"
    if pack:
        assert compiled.data is not None
        assert where["up"] == where["head"] == compiled.data.path
    else:
        assert compiled.data is None
        assert set(where.values()) == {"weights.data"}


def test_load_finds_it_and_the_bundle_is_untouched(quantized: Path) -> None:
    before = contents(quantized)
    compiled = compile_bundle(quantized, silent)
    manifest = read(quantized)
    assert find(quantized, manifest, hashes=True).compiled == compiled
    check_files(quantized, manifest, hashes=True)
    after = contents(quantized)
    assert {name: data for name, data in after.items() if not name.startswith(COMPILED)} == before
    ours = {Path(name).name for name in after.keys() - before.keys()}
    assert ours == {
        DESCRIPTION,
        seal(Path(COMPILED) / cpu_name()).name,
        *(Path(file.path).name for file in compiled.files()),
    }


def test_through_a_link_and_from_another_place(quantized: Path, tmp_path: Path) -> None:
    """ONNX Runtime refuses weights outside a folder that it resolves; a bundle may be moved or linked."""
    (tmp_path / "link").symlink_to(quantized)
    compile_bundle(tmp_path / "link", silent)
    for place in (quantized, shutil.copytree(quantized, tmp_path / "copy"), tmp_path / "link"):
        compiled = find(place, read(place)).compiled
        assert compiled is not None
        options = ort.SessionOptions()
        set_options(options, place, compiled.packed)
        ort.InferenceSession(str(place / compiled.graphs[0].file.path), options)


def test_again_is_the_same_and_repairs(quantized: Path) -> None:
    compiled = compile_bundle(quantized, silent)
    assert compiled.data is not None
    before, data = contents(quantized), quantized / compiled.data.path
    (data.parent / "junk").write_text("of a compile that was killed")
    (data.parent / "tmpjunk").mkdir()
    data.write_bytes(b"cut")
    again = compile_bundle(quantized, silent)
    assert again.model_copy(update={"products": compiled.products}) == compiled, "except for the times"
    after = contents(quantized)
    timed = {
        str((data.parent / DESCRIPTION).relative_to(quantized)),
        str(seal(data.parent).relative_to(quantized)),
    }
    assert {k: v for k, v in after.items() if k not in timed} == {
        k: v for k, v in before.items() if k not in timed
    }
    assert after.keys() == before.keys()


def test_another_result_takes_the_place_of_the_former(floats: Path) -> None:
    first = compile_bundle(floats, silent, pack_fp32=True)
    second = compile_bundle(floats, silent)
    assert find(floats, read(floats)).compiled == second != first
    names = {path.name for path in (floats / COMPILED / cpu_name()).iterdir()}
    assert names == {DESCRIPTION, *(Path(file.path).name for file in second.files())}


@pytest.mark.parametrize("former", [True, False])
@pytest.mark.parametrize("moment", ["_optimize", "take_in", "_write_graph", "compare", "staged_file"])
def test_interrupted_it_leaves_the_former_or_none(
    floats: Path, monkeypatch: pytest.MonkeyPatch, moment: str, former: bool
) -> None:
    if former:
        compile_bundle(floats, silent)
    before = contents(floats)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, moment, stop)
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(floats, silent, pack_fp32=True)
    assert contents(floats) == before
    assert (floats / COMPILED).exists() is former


def test_two_at_once(refused: Refused, quantized: Path) -> None:
    folder = quantized / COMPILED / cpu_name()
    folder.mkdir(parents=True)
    (folder / "junk").write_text("of a compile that was killed")
    with compiling._claimed(folder):
        assert list(folder.iterdir()) == []  # its space is free before more is asked for
        (folder / "half").write_text("of the running compile")
        with refused("compile", f"another compile into {folder} is running", "wait for it"):
            compile_bundle(quantized, silent)
        assert (folder / "half").exists()


@pytest.mark.parametrize(("factor", "words"), [(1.001, "is off by"), (float("nan"), "is off by nan")])
def test_a_difference_is_refused(mock_bundle: Bundle, factor: float, words: str) -> None:
    """The scales of one of two matrices, off by a thousandth."""
    entries = read(mock_bundle("int4")).graphs
    other = mock_bundle("int4", "other", lambda arrays: arrays["up_scales"].__imul__(factor))
    for entry in entries.values():
        plain, changed = [
            (bundle / entry.file.path, ort.SessionOptions()) for bundle in (other.parent / "int4", other)
        ]
        assert compare(plain, plain, entry, 96) == 0.0
        with pytest.raises(CheckFailed, match=f"compiled {entry.shape.name} {words}"):
            compare(plain, changed, entry, 96)


def test_packed_weights_that_the_kernel_does_not_make_are_refused(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob in the wrong place: ONNX Runtime packs again and compares."""
    take_in = compiling.take_in

    def shifted(model: onnx.ModelProto, *rest: Any) -> None:
        take_in(model, *rest)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key.startswith("prepacked"):
                    key, offset, *sizes = entry.value.replace("|", ";").split(";")
                    entry.value = f"{key}|{';'.join([str(int(offset) + 4), *sizes])}"

    monkeypatch.setattr(compiling, "take_in", shifted)
    with pytest.raises(CheckFailed, match="cannot run compiled prefill-4"):
        compile_bundle(quantized, silent)
    assert not (quantized / COMPILED).exists()


def test_not_a_bundle(refused: Refused, tmp_path: Path) -> None:
    with refused("load bundle", "no manifest.json"):
        compile_bundle(tmp_path, silent)


def test_no_graph(refused: Refused, quantized: Path) -> None:
    manifest = read(quantized).model_copy(update={"graphs": {}})
    (quantized / MANIFEST).write_text(manifest.to_json())
    with refused("compile", f"{quantized} has no graph", "stillgraph export bundle"):
        compile_bundle(quantized, silent)


def test_a_graph_that_is_none(refused: Refused, quantized: Path) -> None:
    manifest, path = read(quantized), quantized / "decode-12.onnx"
    path.write_bytes(b"not a graph")
    file = File(path=path.name, nbytes=11, sha256=sha256(path))
    entry = manifest.graphs["decode-12"].model_copy(update={"file": file})
    manifest = manifest.model_copy(update={"graphs": manifest.graphs | {"decode-12": entry}})
    (quantized / MANIFEST).write_text(manifest.to_json())
    with refused("compile", f"cannot optimize {path}", "stillgraph inspect"):
        compile_bundle(quantized, silent)
    assert not (quantized / COMPILED).exists()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_space(refused: Refused, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 1000))
    with refused("compile", "0.00 GB of disk space are free", "free space"):
        compile_bundle(quantized, silent)
    assert not (quantized / COMPILED).exists()


def test_the_disk_fills_up(refused: Refused, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PackedFile, "put", full)
    with refused("compile", f"{cpu_name()}: No space left on device", "free space"):
        compile_bundle(quantized, silent)
    assert not (quantized / COMPILED).exists()
