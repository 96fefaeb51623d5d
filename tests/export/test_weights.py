"""The one file that weights are written to, and graphs that point into it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx import TensorProto, helper

from stillgraph.exporter import weights
from stillgraph.exporter.ir.fold_weights import Origin, Recipe, Tensors, WeightStep, take_out
from stillgraph.exporter.weights import ALIGNMENT

SOURCE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ORIGIN = Origin(("w",), (), 8)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def tensor(name: str) -> torch.Tensor:
    return {"w": SOURCE, "v": torch.arange(5.0)}[name]


def product() -> ir.Model:
    """x @ w.T + 1; v is not used."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
        helper.make_node("Add", ["y", "one"], ["z"]),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("z", [2, 3])))
    one, w = (
        helper.make_tensor(n, TensorProto.FLOAT, s, np.ones(s)) for n, s in (("one", []), ("w", [3, 4]))
    )
    graph = helper.make_graph(nodes, "test", [x], [z], [one, w])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_a_graph_points_into_the_weights_file_and_is_read_without_it(tmp_path: Path) -> None:
    model = product()
    recipes = take_out(model, ["w", "v"])
    names = {"x", *(recipe.name for recipe in recipes)}
    stored = weights.write(tmp_path, recipes, tensor)
    weights.save_graph(model, stored, tmp_path / "graph.onnx")
    assert {value.name for value in model.graph.inputs} == names, "the model stays as it is"
    written = ir.load(tmp_path / "graph.onnx").graph
    assert {value.name for value in written.inputs} == {"x"}
    loaded = written.initializers["w.transpose"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), SOURCE.numpy().T)
    del loaded, written
    (tmp_path / "weights.data").unlink()
    again = weights.load_graph(tmp_path / "graph.onnx")
    assert {value.name for value in again.graph.inputs} == names
    assert set(again.graph.initializers) == {"one"}


def recipes_of(*names: str) -> list[Recipe]:
    return [Recipe((name,), tuple(tensor(name).shape)) for name in names]


def test_layout_aligns_and_does_not_overlap() -> None:
    places = sorted(weights.layout(recipes_of("w", "v"), start=100).values(), key=lambda place: place.offset)
    assert [place.offset for place in places] == [ALIGNMENT, 2 * ALIGNMENT]
    assert [place.nbytes for place in places] == [20, 48]


def test_a_second_write_appends_what_is_missing_alone(tmp_path: Path) -> None:
    written: list[int] = []
    first = weights.write(tmp_path, recipes_of("w"), tensor, advance=written.append)
    before = (tmp_path / weights.WEIGHTS_FILE).read_bytes()
    assert weights.write(tmp_path, recipes_of("w"), tensor, first) is first
    second = weights.write(tmp_path, recipes_of("w", "v"), tensor, first, written.append)
    after = (tmp_path / weights.WEIGHTS_FILE).read_bytes()
    assert after[: len(before)] == before
    assert second.tensors["w"] == first.tensors["w"]
    assert written == [48, 20]
    place = second.tensors["v"]
    np.testing.assert_array_equal(np.frombuffer(after, np.float32, 5, place.offset), np.arange(5.0))
    for stored, content in ((first, before), (second, after)):
        assert stored.file.nbytes == len(content)
        assert stored.file.sha256 == hashlib.sha256(content).hexdigest()


def test_numpy_and_the_file_agree_on_fp16(tmp_path: Path) -> None:
    recipe = Recipe(("w",), (3, 4), HALF, (WeightStep("Cast", HALF),))
    place = weights.write(tmp_path, [recipe], tensor).tensors["w.cast"]
    content: Any = np.fromfile(tmp_path / weights.WEIGHTS_FILE, np.float16, 12, offset=place.offset)
    assert (place.dtype, place.nbytes) == ("FLOAT16", 24)
    np.testing.assert_array_equal(content.reshape(3, 4), SOURCE.numpy().astype(np.float16))


@dataclass(frozen=True)
class Bytes:
    """A weight with the bytes of the one named `content`."""

    name: str
    content: str
    shape: tuple[int, ...] = (6,)
    dtype: ir.DataType = ir.DataType.UINT8
    nbytes: int = 6
    origin: Origin = ORIGIN

    def make(self, tensors: Tensors) -> np.ndarray:
        return np.frombuffer(f"{self.content}-data".encode(), np.uint8)


def test_weights_of_one_content_share_one_place(tmp_path: Path) -> None:
    first = [Bytes("a", "a"), Bytes("b", "b"), Bytes("c", "a", (2, 3))]
    stored = weights.write(tmp_path, first, tensor)
    offsets = {name: place.offset for name, place in stored.tensors.items()}
    assert offsets == {"a": 0, "b": ALIGNMENT, "c": 0}
    assert stored.tensors["c"].shape == (2, 3)
    assert stored.file.nbytes == ALIGNMENT + 6
    more = weights.write(tmp_path, [*first, Bytes("d", "a"), Bytes("e", "e")], tensor, stored)
    assert (more.tensors["d"].offset, more.tensors["e"].offset) == (0, 2 * ALIGNMENT)
    content = (tmp_path / weights.WEIGHTS_FILE).read_bytes()
    assert content[:6] + content[ALIGNMENT:][:6] + content[2 * ALIGNMENT :] == b"a-datab-datae-data"
    assert more.file.sha256 == hashlib.sha256(content).hexdigest()
