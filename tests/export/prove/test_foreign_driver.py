"""A foreign graph's driver and its codes, against numbers that need no exporter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stillgraph.exporter.ort import open_graph
from stillgraph.exporter.prove.foreign import discover
from stillgraph.exporter.prove.foreign_driver import ForeignDecoder
from stillgraph.exporter.prove.foreign_weights import unpack
from stillgraph.spec import LayerSpec, ModelSpec


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", [False, True])
def test_packed_codes_are_what_onnxruntime_reads(tmp_path: Path, bits: int, points: bool) -> None:
    rows, columns, block = 5, 40, 16
    blocks = -(-columns // block)
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    arrays = {"codes": codes, "scales": random.random(rows * blocks, np.float32)}
    if points:
        arrays["points"] = random.integers(0, 256, rows * -(-blocks * bits // 8), np.uint8)
    sizes = {"N": rows, "K": columns, "bits": bits, "block_size": block}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **sizes)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    (found,) = open_graph(tmp_path / "model.onnx", False).run(None, {"x": np.eye(columns, dtype=np.float32)})
    np.testing.assert_allclose(
        unpack(codes, arrays["scales"], arrays.get("points"), sizes), found.T, rtol=1e-5, atol=1e-5
    )


def attention(path: Path, heads: int, head: int, vocab: int) -> ModelSpec:
    """A graph whose logits are one GroupQueryAttention, of ids' embeddings with each other."""

    def port(name: str, kind: int, *sizes: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, sizes)

    table = np.random.default_rng(0).standard_normal((vocab, heads * head), np.float32)
    constants = {"table": table, "one": np.array(1), "axis": np.array([1]), "second": np.array(1)}
    constants |= {name: array.astype(np.int64) for name, array in constants.items() if name != "table"}
    cache = [f"{port}.0.{kind}" for port in ("past_key_values", "present") for kind in ("key", "value")]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["sum"], keepdims=0),
        helper.make_node("Sub", ["sum", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["shape"]),
        helper.make_node("Gather", ["shape", "second"], ["length"]),
        helper.make_node("Cast", ["length"], ["total"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention", ["x", "x", "x", *cache[:2], "seqlens", "total"], ["logits", *cache[2:]],
            domain="com.microsoft", num_heads=heads, kv_num_heads=heads,
        ),
    ]  # fmt: skip
    sizes = 1, heads, "t", head
    graph = helper.make_graph(
        nodes, "attention",
        [port("input_ids", TensorProto.INT64, 1, "s"), port("attention_mask", TensorProto.INT64, 1, "t"),
         *(port(name, TensorProto.FLOAT, *sizes) for name in cache[:2])],
        [port("logits", TensorProto.FLOAT, 1, "s", heads * head),
         *(port(name, TensorProto.FLOAT, 1, heads, "u", head) for name in cache[2:])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    layer = LayerSpec(kind="full_attention", kv_heads=heads, head_dim=head)
    return ModelSpec(
        architecture="Test", vocab_size=heads * head, hidden_size=heads * head, num_attention_heads=heads,
        max_position_embeddings=64, layers=(layer,),
    )  # fmt: skip


@pytest.mark.parametrize("slots", [None, 12])
def test_one_buffer_gives_what_growing_ones_give(tmp_path: Path, slots: int | None) -> None:
    """Against the attention of numpy; what is not held is poisoned and not read."""
    heads, head, ids = 2, 8, np.array([[3, 1, 4, 1, 5, 9]])
    spec = attention(tmp_path / "model.onnx", heads, head, vocab=16)
    graph = discover(tmp_path / "model.onnx", spec)
    assert graph.shares
    decoder = ForeignDecoder(graph, spec, True, slots, compares=True)
    table = np.random.default_rng(0).standard_normal((16, heads * head), np.float32)
    x = table[ids[0]].reshape(-1, heads, head)
    for start, stop in ((0, 3), (3, 5), (5, 6)):
        found = decoder.feed(ids[:, start:stop])
        scores = np.einsum("hd,thd->ht", x[stop - 1], x[:stop]) / np.sqrt(head)
        weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        expected = np.einsum("ht,thd->hd", weights, x[:stop])
        np.testing.assert_allclose(found.reshape(heads, head), expected, atol=1e-5)
    ((layer, first, keys, values),) = decoder.held()
    assert (layer, first) == (0, 0)
    np.testing.assert_array_equal(keys, x.transpose(1, 0, 2))
    np.testing.assert_array_equal(values, keys)
