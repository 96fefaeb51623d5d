"""Recipes of weights against numpy, and how they are found in a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn import functional

from stillgraph.exporter.ir import fold_weights
from stillgraph.exporter.ir.fold_weights import (
    Recipe,
    Tensors,
    WeightStep,
    joined,
    take_out,
    take_out_constants,
)

SOURCE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


TENSORS = Tensors({"w": SOURCE, "v": torch.arange(5.0)}.__getitem__)


@pytest.mark.parametrize("chunk", [1, 4, 1 << 24])
@pytest.mark.parametrize(
    ("shape", "dtype", "steps", "expected"),
    [
        ((3, 4), FLOAT, (), SOURCE.numpy()),
        ((4, 3), FLOAT, (WeightStep("Transpose", (1, 0)),), SOURCE.numpy().T),
        ((3, 4), FLOAT, (WeightStep("Add", 1.0),), SOURCE.numpy() + np.float32(1)),
        ((3, 4), FLOAT, (WeightStep("Mul", 0.37),), SOURCE.numpy() * np.float32(0.37)),
        ((3, 4), HALF, (WeightStep("Cast", HALF),), SOURCE.numpy().astype(np.float16)),
        (
            (4, 3),
            HALF,
            (WeightStep("Cast", HALF), WeightStep("Transpose", (1, 0))),
            SOURCE.numpy().astype(np.float16).T,
        ),
        (
            (3, 4),
            FLOAT,
            (WeightStep("Add", 1.0), WeightStep("Mul", 2.0)),
            (SOURCE.numpy() + np.float32(1)) * np.float32(2),
        ),
    ],
)
def test_make_is_numpy(
    shape: tuple[int, ...],
    dtype: ir.DataType,
    steps: tuple[WeightStep, ...],
    expected: np.ndarray,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fold_weights, "CHUNK", chunk)
    recipe = Recipe(("w",), shape, dtype, steps)
    made = recipe.make(TENSORS)
    np.testing.assert_array_equal(made, expected)
    assert made.flags.c_contiguous
    assert (made.shape, made.dtype, made.nbytes) == (shape, expected.dtype, recipe.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_are_widened_first(dtype: torch.dtype) -> None:
    made = Recipe(("w",), (3, 4), FLOAT, (WeightStep("Add", 1.0),)).make(
        Tensors(lambda name: SOURCE.to(dtype))
    )
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
    recipes = take_out(model, ["w", "v", "absent"])
    by_name = {recipe.name: recipe for recipe in recipes}
    assert set(by_name) == {
        "w.transpose",
        "v.add",
        "v.mul",
    }  # none of an unused "w"; a Cast to fp32 is no step
    np.testing.assert_array_equal(by_name["w.transpose"].make(TENSORS), SOURCE.numpy().T)
    np.testing.assert_array_equal(by_name["v.add"].make(TENSORS), np.arange(5, dtype=np.float32) + 1)
    np.testing.assert_array_equal(by_name["v.mul"].make(TENSORS), np.arange(5, dtype=np.float32) * 2)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add", "Add"]
    assert {value.name for value in model.graph.inputs} == {"x", "x1", *by_name}


def test_large_constants_of_the_trace_are_weights_too() -> None:
    model = structure()
    large = np.arange(300, dtype=np.float32)
    for name, array in (("large", large), ("small", large[:3]), ("again", large)):
        value = ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        model.graph.register_initializer(value)
    recipes = take_out_constants(model)
    assert len({recipe.name for recipe in recipes}) == 1  # equal contents, one name
    np.testing.assert_array_equal(recipes[0].make(TENSORS), large)
    assert "small" in model.graph.initializers


class Fused(torch.nn.Module):
    """Two products of one input as one, and a lone one."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 2, bias=False)
        self.o_proj = torch.nn.Linear(5, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = self.o_proj(
            functional.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight]))
        )
        return heads


def test_weights_put_together_while_tracing_are_one_recipe() -> None:
    module = Fused().eval().requires_grad_(False)
    program = torch.onnx.export(
        module, (torch.zeros(2, 3, 4),), dynamo=True, opset_version=23, optimize=False, verbose=False
    )
    assert program is not None
    recipes = take_out(program.model, list(module.state_dict()))
    assert [(recipe.name, recipe.shape) for recipe in recipes] == [
        ("q_proj+k_proj.weight.transpose", (4, 5)),
        ("o_proj.weight.transpose", (5, 4)),
    ]
    made = recipes[0].make(Tensors(module.state_dict().__getitem__))
    expected = np.concatenate([module.q_proj.weight.numpy(), module.k_proj.weight.numpy()]).T
    np.testing.assert_array_equal(made, expected)
    assert [node.op_type for node in program.model.graph] == ["MatMul", "MatMul"]


def test_put_together_otherwise_they_stay_apart() -> None:
    nodes = [
        helper.make_node("Concat", ["w", "w"], ["beside"], axis=1),
        helper.make_node("Concat", ["w", "x"], ["with an input"], axis=0),
        helper.make_node("Add", ["w", "one"], ["w1"]),
        helper.make_node("Concat", ["w", "w1"], ["worked on"], axis=0),
    ]
    floats = {"w": [3, 4], "x": [3, 4], "beside": [3, 8], "with an input": [6, 4], "worked on": [6, 4]}
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in floats.items()}
    constants = [helper.make_tensor("w", TensorProto.FLOAT, [3, 4], np.zeros(12)),
                 helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])]  # fmt: skip
    graph = helper.make_graph(nodes, "test", [values["x"]], list(values.values())[2:], constants)
    model = ir.from_proto(helper.make_model(graph))
    assert [recipe.name for recipe in take_out(model, ["w"])] == ["w", "w.add"]
    assert [node.op_type for node in model.graph] == ["Concat"] * 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a.w",), "a.w"),
        (("m.0.q.w", "m.0.k.w", "m.0.v.w"), "m.0.q+k+v.w"),
        (("m.0.q", "m.0.k"), "m.0.q+k"),
        (("q.w", "k.w"), "q+k.w"),
        (("q", "k"), "q+k"),
        (("m.a.w", "m.b.c.w"), "m.a+b.c.w"),
        (("m.w", "m.w.w"), "m.w+w.w"),
        (("m.w", "m.w"), "m.w+w"),
    ],
)
def test_names_of_several_sources_say_what_they_share_once(names: tuple[str, ...], expected: str) -> None:
    assert joined(names) == expected


def test_the_last_thing_made_is_kept_and_no_other() -> None:
    tensors, made = Tensors(lambda name: SOURCE), list[str]()

    def make(key: str) -> str:
        return str(tensors.once(key, lambda: made.append(key) or key.upper()))

    assert [make(key) for key in "aabba"] == ["A", "A", "B", "B", "A"]
    assert made == ["a", "b", "a"]
