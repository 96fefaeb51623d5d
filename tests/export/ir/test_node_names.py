"""Nodes of exported graphs say which module they belong to; those made on the way do too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from stillgraph.exporter.ir.node_names import name_the_rest, place

SLIDING, FULL = "sliding_attention", "full_attention"
FIVE: dict[str, Any] = {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, *[SLIDING] * 3]}
BUNDLES: dict[str, dict[str, Any]] = {  # other tests read them too, so that hardly one is made for these
    "portable fp32": FIVE,
    "portable int4": {"precision": "int4"},
    "onnxruntime fp32": {**FIVE, "target": "onnxruntime"},
    "onnxruntime int4": {"target": "onnxruntime", "precision": "int4", "fast_prefill": True},
}
PRODUCTS = {"MatMul", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul"}
Bundle = Callable[..., Path]


def part(name: str) -> str:
    """As `place`, of a node in a file."""
    return place(ir.Node("", "Add", [], name=name))


@pytest.mark.parametrize("name", BUNDLES)
def test_every_node_of_a_layer_is_named_after_it(tiny_bundle: Bundle, name: str) -> None:
    layers = {f"layers.{index}" for index in range(BUNDLES[name].get("num_hidden_layers", 2))}
    for path in tiny_bundle(**BUNDLES[name]).glob("*.onnx"):
        nodes = onnx.load(path, load_external_data=False).graph.node
        assert len({node.name for node in nodes}) == len(nodes)
        found = {part(node.name) for node in nodes} - {"", "rotary_emb"}
        assert found == layers | {"embed_tokens", "norm", "lm_head"}
        for node in nodes:
            for value in (*node.input, *node.output):
                if of := re.match(r"(?:past_key_values|present|model\.layers)\.(\d+)\.", value):
                    assert part(node.name) == f"layers.{of[1]}", (node.name, value)
        lost = [node for node in nodes if not part(node.name)]
        assert PRODUCTS & {node.op_type for node in lost} == set()
        # What there is once: positions, masks, lengths. A layer has more nodes than all of it.
        assert len(lost) < sum(part(node.name) == "layers.1" for node in nodes) / 2, [n.name for n in lost]


def test_a_product_keeps_its_module_when_its_weights_become_int4(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle(**BUNDLES["portable int4"])
    (path,) = bundle.glob("decode*.onnx")
    nodes = onnx.load(path, load_external_data=False).graph.node
    modules = {node.name.partition("/")[0] for node in nodes if node.op_type == "DequantizeLinear"}
    owners = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj"
    expected = {
        f"layers.{index}.{owner}" for index in range(2) for owner in [*owners.split(), "mlp.down_proj"]
    }
    assert modules == expected | {"lm_head", "embed_tokens"}


def graph_of(*steps: tuple[str, list[str]]) -> dict[str, ir.Node]:
    """Nodes by their name as they are given, (name, names of the nodes or inputs that they read), renamed."""
    values: dict[str, ir.Value] = {"x": ir.Value(name="x")}
    nodes = {}
    for name, reads in steps:
        nodes[name] = ir.Node("", "Sum", [values[read] for read in reads], name=name)
        values[name] = nodes[name].outputs[0]
    outputs = [values[steps[-1][0]]]
    graph = ir.Graph([values["x"]], outputs, nodes=list(nodes.values()), opset_imports={"": 20})
    name_the_rest(ir.Model(graph, ir_version=10))
    return nodes


def test_a_node_without_a_module_goes_where_its_neighbors_are() -> None:
    nodes = graph_of(
        ("mask", ["x"]),
        ("table", ["x"]),
        ("flat", ["table"]),
        ("layers.0.mlp/a", ["flat", "mask"]),
        ("split", ["mask", "layers.0.mlp/a"]),
        ("again", ["split"]),
        ("layers.1.mlp/b", ["again", "mask"]),
    )
    names = {former: node.name for former, node in nodes.items()}
    assert names["mask"] == "mask"  # two layers read it
    assert (names["table"], names["flat"]) == ("layers.0/table", "layers.0/flat")  # one reads them
    assert (names["split"], names["again"]) == (
        "layers.0/split",
        "layers.0/again",
    )  # made of a layer's values
    assert names["layers.1.mlp/b"] == "layers.1.mlp/b"
