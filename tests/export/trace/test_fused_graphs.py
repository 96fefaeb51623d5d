"""The nodes of the onnxruntime target's graphs, and their shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest

from stillgraph.exporter.ir.simplify import static_problem
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import Quantization, read
from stillgraph.spec import GraphShape

SLIDING, FULL = "sliding_attention", "full_attention"
ORT: dict[str, Any] = {"target": "onnxruntime"}
FIVE: dict[str, Any] = {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, *[SLIDING] * 3]}
NO_SLACK: dict[str, Any] = {"slack": 0, "shapes": [("prefill", 1, 40), ("decode", 1, 40)], "head_dim": 16}
NODES_A_LAYER = 17
MOVING = {"Transpose", "Reshape", "Concat", "Gather", "Where", "Expand", "ScatterND", "Cast", "Slice"}
Bundle = Callable[..., Path]


def graphs_of(bundle: Path) -> dict[str, onnx.GraphProto]:
    return {
        graph.shape.role: onnx.load(bundle / graph.file.path, load_external_data=False).graph
        for graph in read(bundle).graphs.values()
    }


@pytest.fixture
def five(tiny_bundle: Bundle) -> Path:
    """Five layers with heads of 24, whose RoPE is outside the op: a layer has all nodes that there are."""
    return tiny_bundle(**FIVE, **ORT)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_op_a_layer_owns_the_cache(five: Path, role: str) -> None:
    """No other node reads or writes a key or value buffer: none is transposed, reshaped or copied."""
    graph = graphs_of(five)[role]
    owners = [
        node for node in graph.node for name in (*node.input, *node.output)
        if name.startswith(("past_key_values.", "present."))
    ]  # fmt: skip
    assert {node.op_type for node in owners} == {"GroupQueryAttention"}
    assert Counter(node.op_type for node in graph.node)["GroupQueryAttention"] == 5
    assert len(owners) == 5 * 4
    for index, node in enumerate(n for n in graph.node if n.op_type == "GroupQueryAttention"):
        assert list(node.input[3:5]) == [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
        assert list(node.output[1:]) == [f"present.{index}.{kind}" for kind in ("key", "value")]
        values = {attribute.name: attribute.i for attribute in node.attribute}
        window = 5 if index != 1 else -1
        assert (values["local_window_size"], values["sliding_window_cache"]) == (window, int(index != 1))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_every_shape_is_a_number_and_every_buffer_its_layers(five: Path, role: str) -> None:
    manifest, graph = read(five), graphs_of(five)[role]
    known = {value.name for value in (*graph.output, *graph.value_info)}
    assert [name for node in graph.node for name in node.output if name and name not in known] == []
    assert static_problem(graph) is None
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.input
    }
    for index in range(5):
        slots = 40 + 15 if index == 1 else 5 + 15  # ctx, or the window, and the slack
        for kind in ("key", "value"):
            assert shapes[f"past_key_values.{index}.{kind}"] == (1, 2, slots, 24)
    entry = manifest.graph(role)
    assert entry is not None
    assert entry.shape.slack == 15
    assert {alias.same_buffer for alias in entry.aliases} == {True}
    assert [(alias.input, alias.output) for alias in entry.aliases] == [
        (f"past_key_values.{index}.{kind}", f"present.{index}.{kind}")
        for index in range(5)
        for kind in ("key", "value")
    ]  # fmt: skip


@pytest.mark.parametrize(("values", "most"), [(FIVE, NODES_A_LAYER + 2), (NO_SLACK, NODES_A_LAYER)])
def test_a_decode_has_few_nodes_and_none_that_moves_data(
    tiny_bundle: Bundle, values: dict[str, Any], most: int
) -> None:
    """From one attention to the next is a layer. RoPE before the op, for heads of 24, is 2 nodes more."""
    ops = [node.op_type for node in graphs_of(tiny_bundle(**values, **ORT))["decode"].node]
    attends = [index for index, op in enumerate(ops) if op == "GroupQueryAttention"]
    assert len(attends) == len(values.get("layer_types", (SLIDING, FULL)))
    for start, end in pairwise(attends):
        found = Counter(ops[start:end])
        assert end - start <= most, found
        assert found["MatMul"] == 4, found  # q,k,v in one; o; gate,up in one; down
        assert MOVING & set(found) == set(), found
    assert len(ops) - len(attends) * most <= 20  # what there is once: embedding, lengths, positions, head


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (("v_proj=int8",), {"q_proj+k_proj", "v_proj", "gate_proj+up_proj"}),
        (("k_proj=int8",), {"q_proj", "k_proj", "v_proj", "gate_proj+up_proj"}),
        (("self_attn=int8", "up_proj=int8"), {"q_proj+k_proj+v_proj", "gate_proj", "up_proj"}),
    ],
)
def test_weights_of_one_input_are_one_product_where_they_are_stored_alike(
    tiny_bundle: Bundle, keep: tuple[str, ...], expected: set[str]
) -> None:
    bundle = tiny_bundle(precision="int4", keep=keep, **ORT)
    for graph in graphs_of(bundle).values():
        products = {node.input[1] for node in graph.node if node.op_type == "MatMulNBits"}
        parts = {part for name in products for part in name.split(".") if part.partition("_proj")[1]}
        assert parts == expected | {"o_proj", "down_proj"}
    parity = validate(bundle, depth="default", say=lambda line: None)
    assert parity.passed
    assert max(c.worst.relative_error for c in parity.cases if not c.optimized) < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fast_prefill_quantizes_each_input_once(tiny_bundle: Bundle, batch: int) -> None:
    """Gate and up share theirs, and up is not scaled for a product whose codes do not depend on its scale."""
    bundle = tiny_bundle(precision="int8", fast_prefill=True, batch=batch, **ORT)
    graph, width = graphs_of(bundle)["prefill"], 80  # intermediate_size
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    found, layers = Counter(node.op_type for node in graph.node), len(read(bundle).model.layers)
    assert found["MatMulIntegerToFloat"] == 5 * layers  # q,k,v in one; o; gate; up; down
    assert found["QuantizeLinear"] == (4 + 2) * layers  # and what the first tokens of o and down leave over
    assert found["Split"] == layers  # q, k and v
    wide = [node for node in graph.node if node.op_type == "Mul" and shapes[node.output[0]][-1] == width]
    assert len(wide) == 2 * layers  # gate's scale; what gate becomes, times up


@pytest.mark.parametrize(
    ("keep", "max_len", "apart"), [({}, 16, True), ({"mlp": "fp32"}, 16, False), ({}, 1, False)]
)
def test_gate_and_up_are_apart_where_they_are_quantized_for_both(
    keep: Any, max_len: int, apart: bool
) -> None:
    """What is kept in fp32 is stored once for both graphs, so it has to be the same matrix in both."""
    how = Quantization(block_size=32, keep=keep, fast_prefill=True)
    prefill = GraphShape(role="prefill", max_len=max_len, ctx=40, slack=15, int8_activations=True)
    plain = prefill.model_copy(update={"int8_activations": False})
    decode = GraphShape(role="decode", max_len=1, ctx=40, slack=15)
    for shape, expected in ((prefill, apart), (plain, False), (decode, False)):
        assert StoragePlan.of("onnxruntime", "int4", how, shape, None).splits_mlp(shape) is expected


def test_validation_passes_and_walks_to_the_last_slot(five: Path) -> None:
    parity = validate(five, depth="quick", say=lambda line: None)
    assert parity.passed
    assert max(c.position for case in parity.cases for c in case.comparisons) == 39
