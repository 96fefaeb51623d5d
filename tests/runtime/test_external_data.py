"""Files that a graph reads, against onnx's own reader; a graph that reads what its manifest does not list."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from stillgraph import load
from stillgraph.external_data import unlisted_files
from stillgraph.files import describe
from stillgraph.manifest import read

Refused = Callable[..., AbstractContextManager[None]]


def outside(path: str, name: str = "w") -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=path)
    tensor.external_data.add(key="offset", value="0")
    return tensor


def saved(graph: onnx.GraphProto, path: Path) -> Path:
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def branch(path: str) -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "branch", [], [], [outside(path)])


PLACES = {
    "an initializer": lambda: helper.make_graph([], "g", [], [], [outside("a"), outside("other")]),
    "a constant": lambda: helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=outside("other"))], "g", [], []
    ),
    "a branch": lambda: helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("other"))],
        "g",
        [],
        [],
    ),
    "a list of tensors": lambda: helper.make_graph(
        [helper.make_node("Own", [], ["c"], values=[outside("a"), outside("other")])], "g", [], []
    ),
    "a name with the word in it": lambda: helper.make_graph(
        [], "location", [], [], [outside("a", "location"), outside("other")]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_is_not_listed_is_found_wherever_it_is_named(place: str, tmp_path: Path) -> None:
    path = saved(PLACES[place](), tmp_path / "g.onnx")
    assert unlisted_files(path, ["a"]) == {"other"}
    assert unlisted_files(path, ["a", "other"]) == set()


def test_fields_in_another_order_or_twice(tmp_path: Path) -> None:
    """Protobuf's readers take the last of two values, and a length of any number of bytes."""
    twice = b"\x0a\x08location\x12\x01a\x12\x05other"
    reverse = b"\x12\x05other\x0a\x08location"
    padded = b"\x0a\x88\x00location\x12\x05other"
    for entry in (twice, reverse, padded):
        tensor = b"\x6a" + bytes([len(entry)]) + entry
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        content = b"\x3a" + bytes([len(graph)]) + graph
        (read_back,) = onnx.ModelProto.FromString(content).graph.initializer
        assert [each.value for each in read_back.external_data] == ["other"]
        (tmp_path / "g.onnx").write_bytes(content)
        assert unlisted_files(tmp_path / "g.onnx", ["a"]) == {"other"}


@pytest.mark.parametrize(
    "content",
    [
        b"location",
        b"\x3a\x7flocation",
        b"\x0alocation",
        b"\xff" * 20 + b"location",
        b"\x3a\x00location\x09\x01",
    ],
)
def test_what_is_no_graph(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"wire type|cut short|no end|longer"):
        unlisted_files(tmp_path / "g.onnx", ["a"])


def test_a_bundle_whose_graph_reads_another_file(
    tiny_bundle: Callable[..., Path], tmp_path: Path, refused: Refused
) -> None:
    """With the right size, sums and hash of the graph in its manifest: as someone would who means it."""
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path / "own"))
    shutil.copyfile(bundle / "weights.data", bundle / "unlisted.bin")
    path = bundle / "decode-40.onnx"
    graph = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    tensor.external_data[0].value = "unlisted.bin"
    path.write_bytes(graph.SerializeToString())
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["graphs"]["decode-40"]["file"] = json.loads(describe(bundle, path).model_dump_json())
    (bundle / "manifest.json").write_text(json.dumps(raw))
    assert read(bundle).graphs["decode-40"].file.nbytes == path.stat().st_size
    with refused("load bundle", "decode-40.onnx", "unlisted.bin", "manifest"):
        load(bundle)
