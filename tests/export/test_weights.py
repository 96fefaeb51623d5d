"""Recipes of weights against numpy, and the one file they are written to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from export import weights
from export.weights import ALIGNMENT, Recipe, Step

SOURCE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def tensor(name: str) -> torch.Tensor:
    return {"w": SOURCE, "v": torch.arange(5.0)}[name]


@pytest.mark.parametrize(
    ("shape", "dtype", "steps", "expected"),
    [
        ((3, 4), FLOAT, (), SOURCE.numpy()),
        ((4, 3), FLOAT, (Step("Transpose", (1, 0)),), SOURCE.numpy().T),
        ((3, 4), FLOAT, (Step("Add", 1.0),), SOURCE.numpy() + np.float32(1)),
        ((3, 4), FLOAT, (Step("Mul", 0.37),), SOURCE.numpy() * np.float32(0.37)),
        ((3, 4), HALF, (Step("Cast", HALF),), SOURCE.numpy().astype(np.float16)),
        ((4, 3), HALF, (Step("Cast", HALF), Step("Transpose", (1, 0))), SOURCE.numpy().astype(np.float16).T),
        (
            (3, 4),
            FLOAT,
            (Step("Add", 1.0), Step("Mul", 2.0)),
            (SOURCE.numpy() + np.float32(1)) * np.float32(2),
        ),
    ],
)
def test_make_is_numpy(
    shape: tuple[int, ...], dtype: ir.DataType, steps: tuple[Step, ...], expected: np.ndarray
) -> None:
    recipe = Recipe("w", shape, dtype, steps)
    made = recipe.make(tensor)
    np.testing.assert_array_equal(made, expected)
    assert made.flags.c_contiguous
    assert (made.shape, made.dtype, made.nbytes) == (shape, expected.dtype, recipe.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_are_widened_first(dtype: torch.dtype) -> None:
    made = Recipe("w", (3, 4), FLOAT, (Step("Add", 1.0),)).make(lambda name: SOURCE.to(dtype))
    np.testing.assert_array_equal(made, SOURCE.to(dtype).float().numpy() + np.float32(1))


def structure() -> ir.Model:
    """x @ w.T, then * (1 + v), and x itself + 1: of these only the first two are computations on a weight."""
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
        helper.make_node("Add", ["one", "v"], ["v1"]),
        helper.make_node("Add", ["x1", "v1"], ["z"]),
        helper.make_node("Cast", ["v"], ["v2"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["v2", "two"], ["v3"]),
        helper.make_node("Add", ["z", "v3"], ["u"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("x1", [5]))]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("y", [2, 3]), ("u", [5]))]
    one, two = (helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in (("one", 1.0), ("two", 2.0)))
    zeros = [helper.make_tensor(n, TensorProto.FLOAT, s, np.zeros(s)) for n, s in (("w", [3, 4]), ("v", [5]))]
    graph = helper.make_graph(nodes, "test", inputs, outputs, [one, two, *zeros])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_take_out_leaves_inputs_named_by_their_recipes() -> None:
    model = structure()
    recipes = weights.take_out(model, ["w", "v", "absent"])
    by_name = {recipe.name: recipe for recipe in recipes}
    assert set(by_name) == {
        "w.transpose",
        "v.add",
        "v.mul",
    }  # none of an unused "w"; a Cast to fp32 is no step
    np.testing.assert_array_equal(by_name["w.transpose"].make(tensor), SOURCE.numpy().T)
    np.testing.assert_array_equal(by_name["v.add"].make(tensor), np.arange(5, dtype=np.float32) + 1)
    np.testing.assert_array_equal(by_name["v.mul"].make(tensor), np.arange(5, dtype=np.float32) * 2)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Add"]
    assert {value.name for value in model.graph.inputs} == {"x", "x1", *by_name}


def test_attach_and_detach_are_each_other_reversed(tmp_path: Path) -> None:
    model = structure()
    recipes = weights.take_out(model, ["w", "v"])
    stored = weights.write(tmp_path, recipes, tensor)
    weights.attach(model, stored)
    assert {value.name for value in model.graph.inputs} == {"x", "x1"}
    ir.save(model, tmp_path / "graph.onnx")
    loaded = ir.load(tmp_path / "graph.onnx").graph.initializers["w.transpose"].const_value
    assert loaded is not None
    np.testing.assert_array_equal(loaded.numpy(), SOURCE.numpy().T)
    weights.detach(model)
    assert {value.name for value in model.graph.inputs} == {"x", "x1", *(recipe.name for recipe in recipes)}
    assert set(model.graph.initializers) == {"one", "two"}


def test_large_constants_of_the_trace_are_weights_too() -> None:
    model = structure()
    large = np.arange(300, dtype=np.float32)
    for name, array in (("large", large), ("small", large[:3]), ("again", large)):
        value = ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        model.graph.register_initializer(value)
    recipes = weights.take_out_constants(model)
    assert len({recipe.name for recipe in recipes}) == 1  # equal contents, one name
    np.testing.assert_array_equal(recipes[0].make(tensor), large)
    assert "small" in model.graph.initializers


def recipes_of(*names: str) -> list[Recipe]:
    return [Recipe(name, tuple(tensor(name).shape)) for name in names]


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
    recipe = Recipe("w", (3, 4), HALF, (Step("Cast", HALF),))
    place = weights.write(tmp_path, [recipe], tensor).tensors["w.cast"]
    content: Any = np.fromfile(tmp_path / weights.WEIGHTS_FILE, np.float16, 12, offset=place.offset)
    assert (place.dtype, place.nbytes) == ("FLOAT16", 24)
    np.testing.assert_array_equal(content.reshape(3, 4), SOURCE.numpy().astype(np.float16))
