"""What may be in a graph that ships, what simplification must keep, and what its checks find."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from stillgraph.errors import CheckFailed
from stillgraph.exporter import weights
from stillgraph.exporter.ir.fold_weights import SUBGRAPH_BYTES
from stillgraph.exporter.ir.simplify import (
    FORBIDDEN,
    check,
    primitive,
    same_outputs,
    simplify,
    static_problem,
)
from stillgraph.exporter.ort import empty_in, open_graph, run
from stillgraph.exporter.targets import TARGETS
from stillgraph.manifest import read

FIVE = {
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3],
}
BUNDLES: dict[str, dict[str, Any]] = {
    "fp32": {**FIVE},
    "fp16": {"precision": "fp16"},
    "not tied": {"precision": "fp16", "tie_word_embeddings": False},
}
Bundle = Callable[..., Path]


def graphs(bundle: Path) -> list[onnx.ModelProto]:
    return [onnx.load(path, load_external_data=False) for path in sorted(bundle.glob("*.onnx"))]


def external(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("name", BUNDLES)
def test_shipped_graphs_are_static_and_standard(tiny_bundle: Bundle, name: str) -> None:
    for model in graphs(tiny_bundle(**BUNDLES[name])):
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        assert list(opsets) == [""]
        assert opsets[""] <= TARGETS["portable"].opset <= 20
        assert not model.functions
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        assert {node.domain for node in inferred.node} == {""}
        assert not {node.op_type for node in inferred.node} & FORBIDDEN
        sizes = {}
        for value in (*inferred.input, *inferred.output, *inferred.value_info):
            dims = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims)
            sizes[value.name] = math.prod(dim.dim_value for dim in dims)
        # Grouped heads: nothing of the size of a key buffer is ever expanded.
        expanded = [sizes[node.output[0]] for node in inferred.node if node.op_type in ("Expand", "Tile")]
        assert max(expanded, default=0) < sizes["present.0.key"]
        assert static_problem(inferred) is None


@pytest.mark.parametrize("name", BUNDLES)
def test_both_graphs_point_into_one_file_and_nothing_is_there_twice(tiny_bundle: Bundle, name: str) -> None:
    bundle = tiny_bundle(**BUNDLES[name])
    manifest = read(bundle)
    pointers = [external(model) for model in graphs(bundle)]
    for pointer in pointers:
        for tensor, place in pointer.items():
            expected = manifest.weights.tensors[tensor]
            assert place["location"] == weights.WEIGHTS_FILE
            assert (int(place["offset"]), int(place["length"])) == (expected.offset, expected.nbytes)
    shared = pointers[0].keys() & pointers[1].keys()
    matrices = {name for name, place in manifest.weights.tensors.items() if len(place.shape) > 1}
    assert {name for name in matrices if name.startswith("model.")} <= shared
    assert pointers[0].keys() | pointers[1].keys() == manifest.weights.tensors.keys()
    end = 0
    for place in sorted(manifest.weights.tensors.values(), key=lambda place: place.offset):
        assert place.offset % 64 == 0
        assert 0 <= place.offset - end < weights.ALIGNMENT  # padding alone lies between two weights
        end = place.offset + place.nbytes
    assert end == (bundle / weights.WEIGHTS_FILE).stat().st_size


@pytest.mark.parametrize("name", BUNDLES)
def test_no_weight_has_a_copy(tiny_bundle: Bundle, name: str) -> None:
    """Neither as the same bytes nor transposed: each tensor of the checkpoint is one tensor of the file."""
    bundle = tiny_bundle(**BUNDLES[name])
    places = read(bundle).weights.tensors
    content = (bundle / weights.WEIGHTS_FILE).read_bytes()
    contents = [content[place.offset : place.offset + place.nbytes] for place in places.values()]
    assert len(set(contents)) == len(contents)
    sources = [name.partition(".weight")[0] for name in places if ".weight" in name]
    assert len(set(sources)) == len(sources)


def test_no_graph_file_holds_a_weight(tiny_bundle: Bundle) -> None:
    for model in graphs(tiny_bundle(**FIVE)):
        inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
        assert max(t.ByteSize() for t in inside) <= SUBGRAPH_BYTES + 100  # name and dims


def test_simplify_again_changes_nothing(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle(**FIVE)
    for path in bundle.glob("*.onnx"):
        model = weights.load_graph(path)
        before = [node.op_type for node in model.graph]
        after, steps = simplify(model)
        assert [node.op_type for node in after.graph] == before
        assert [step.step for step in steps] == ["fold", "onnxsim", "tidy"]
        assert {step.nodes_before for step in steps} == {step.nodes_after for step in steps} == {len(before)}


def small(node: onnx.NodeProto, shape: list[int | str], **graph: Any) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    inputs += [helper.make_tensor_value_info(n, t, s) for n, t, s in graph.pop("inputs", [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, graph.pop("result", shape))]
    made = helper.make_graph([node], "test", inputs, outputs)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def branch(value: float) -> onnx.GraphProto:
    constant = helper.make_tensor("c", TensorProto.FLOAT, [2], [value, value])
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])
    return helper.make_graph([helper.make_node("Constant", [], ["b"], value=constant)], "branch", [], [out])


def an_if() -> onnx.ModelProto:
    node = helper.make_node("If", ["c"], ["y"], "n", then_branch=branch(1.0), else_branch=branch(2.0))
    return small(node, [2], inputs=[("c", TensorProto.BOOL, [])])


def a_loop() -> onnx.ModelProto:
    more = [
        helper.make_tensor_value_info(n, t, [])
        for n, t in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))
    ]
    carried = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("a", "b")]
    nodes = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["a"], ["b"])]
    ends = [helper.make_tensor_value_info("d", TensorProto.BOOL, []), carried[1]]
    body = helper.make_graph(nodes, "body", [*more, carried[0]], ends)
    node = helper.make_node("Loop", ["n", "", "x"], ["y"], "n", body=body)
    return small(node, [2], inputs=[("n", TensorProto.INT64, [])])


PROBLEMS: dict[str, tuple[onnx.ModelProto, str]] = {
    "if": (an_if(), "node 'n' is a If"),
    "loop": (a_loop(), "node 'n' is a Loop"),
    "named dim": (
        small(helper.make_node("Neg", ["x"], ["y"]), [2, "batch"]), "of the graph's inputs has a dimension"
    ),
    "subgraph": (
        small(helper.make_node("Any", ["x"], ["y"], "n", domain="any", body=branch(1.0)), [2]),
        "node 'n' is a Any",
    ),
    "nonzero": (
        small(helper.make_node("NonZero", ["x"], ["y"], "n"), [2], result=[1, "k"]), "node 'n' is a NonZero"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_static_problem(name: str) -> None:
    model, sentence = PROBLEMS[name]
    assert sentence in (static_problem(model.graph) or "")


def test_static_problem_of_a_value_without_a_shape() -> None:
    nodes = [helper.make_node("Neg", ["x"], ["h"]), helper.make_node("Neg", ["h"], ["y"])]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    assert (
        static_problem(helper.make_graph(nodes, "test", [value], [result])) == "value 'h' of Neg has no shape"
    )


def test_static_problem_of_a_dynamic_input_that_only_a_static_value_uses() -> None:
    """A graph may hide a named dimension of an input behind a reduction."""
    node = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    problem = static_problem(small(node, ["batch", 4], result=[]).graph)
    assert problem == "value 'x' of the graph's inputs has a dimension that is not a number"


@pytest.mark.parametrize("name", ["named dim", "loop"])
def test_check_refuses_what_it_finds(name: str) -> None:
    with pytest.raises(CheckFailed) as caught:
        check(ir.from_proto(PROBLEMS[name][0]))
    assert caught.value.exit_code == 1
    assert caught.value.stage == "simplify"


def scaled(path: Path, factor: float) -> Path:
    node = helper.make_node("Mul", ["x", "f"], ["y"])
    model = small(node, [2, 3])
    model.graph.initializer.append(helper.make_tensor("f", TensorProto.FLOAT, [1], [factor]))
    onnx.save(model, path)
    return path


def test_same_outputs(tmp_path: Path) -> None:
    first, near = scaled(tmp_path / "a.onnx", 1.0), scaled(tmp_path / "b.onnx", 1.000001)
    assert same_outputs(first, first) == 0.0
    assert 0 < same_outputs(first, near) < 1e-5
    with pytest.raises(CheckFailed, match=r"c\.onnx differs from the traced graph by 1\.00e-03"):
        same_outputs(first, scaled(tmp_path / "c.onnx", 1.001))
    with pytest.raises(CheckFailed, match="nan"):
        same_outputs(first, scaled(tmp_path / "d.onnx", float(np.nan)))


def test_what_is_compared_has_a_kernel_for_every_node(tmp_path: Path) -> None:
    """A node without one would run last, behind every weight that was widened to fp32."""
    nodes = [
        helper.make_node("CastLike", ["x", "f"], ["z"], name="cast"),
        helper.make_node("Mul", ["z", "f"], ["y"]),
    ]
    model = small(nodes[1], [2, 3])
    model.graph.node.insert(0, nodes[0])
    model.graph.initializer.append(helper.make_tensor("f", TensorProto.FLOAT, [1], [2.0]))
    onnx.save(model, tmp_path / "trace.onnx")
    found = ir.to_proto(primitive(ir.from_proto(model)))
    onnx.save(found, tmp_path / "copy.onnx")
    assert [node.op_type for node in found.graph.node] == ["Cast", "Mul"]
    assert [value.name for value in found.graph.output] == ["y"]
    assert same_outputs(tmp_path / "trace.onnx", tmp_path / "copy.onnx") == 0.0


def test_a_comparison_leaves_no_file(tmp_path: Path) -> None:
    graph = scaled(tmp_path / "a.onnx", 1.0)
    same_outputs(graph, graph)
    assert list(tmp_path.iterdir()) == [graph]


def test_arrays_in_a_folder_are_written_and_read_as_any(tmp_path: Path) -> None:
    session = open_graph(scaled(tmp_path / "a.onnx", 2.0), optimized=False)
    empty = empty_in(tmp_path)
    feeds = {"x": empty([2, 3], np.float32)}
    feeds["x"][:] = np.arange(6).reshape(2, 3)
    (found,) = run(session, feeds, empty=empty)
    assert found.tolist() == [[0, 2, 4], [6, 8, 10]]
    assert isinstance(found, np.memmap)
