"""Small bundles of two graphs made without a model: the ops that ONNX Runtime packs weights for, and a cache.

Shapes: S tokens, C cache slots, V vocabulary, H hidden size, N rows of the matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stillgraph.calling import Calling, Tokens
from stillgraph.files import sha256
from stillgraph.manifest import MANIFEST, Alias, CheckpointSource, File, GraphEntry, Manifest, Weights
from stillgraph.ports import input_ports, output_ports
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec

Arrays = dict[str, np.ndarray]
V, H, N, BLOCK, CTX = 96, 256, 512, 32, 12
SHAPES = (GraphShape(role="prefill", max_len=4, ctx=CTX), GraphShape(role="decode", max_len=1, ctx=CTX))
SPEC = ModelSpec(
    architecture="Mock",
    vocab_size=V,
    hidden_size=H,
    num_attention_heads=1,
    max_position_embeddings=64,
    layers=(LayerSpec(kind="full_attention", kv_heads=1, head_dim=1),),
)
INT4 = {"K": H, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}


def described(bundle: Path, name: str) -> File:
    path = bundle / name
    return File(path=name, nbytes=path.stat().st_size, sha256=sha256(path))


def float_weights() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"table": (V, H), "up": (H, N), "head": (H, V)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def quantized_weights() -> Arrays:
    """int4 in blocks along H: the tied head, read as a table too, two products, and one vector for all."""
    rng = np.random.default_rng(0)
    arrays: Arrays = {"scale": rng.standard_normal(H).astype(np.float32)}
    for name, rows in (("head", V), ("up", N), ("gate", N)):
        arrays[name] = rng.integers(0, 256, (rows, H // BLOCK, BLOCK // 2), np.uint8)
        arrays[f"{name}_scales"] = rng.random((rows, H // BLOCK), np.float32) / 10
    return arrays


def quantized_nodes() -> list[onnx.NodeProto]:
    """The two products of one row, mixed into the row of its token; a cache that gets their sum added."""
    ms = {"domain": "com.microsoft"}
    gather = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    return [
        helper.make_node(
            "GatherBlockQuantized", ["table", "input_ids", "head_scales"], ["x"], **ms, **gather
        ),
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        helper.make_node("MatMulNBits", ["scaled", "up", "up_scales"], ["u"], N=N, **ms, **INT4),
        helper.make_node("MatMulNBits", ["scaled", "gate", "gate_scales"], ["g"], N=N, **ms, **INT4),
        helper.make_node("Mul", ["u", "g"], ["product"]),
        helper.make_node("ReduceSum", ["product", "last_axes"], ["sum"], keepdims=1),  # [1, 1, 1]
        helper.make_node("ReduceMean", ["scaled", "token_axis"], ["mean"], keepdims=1),  # [1, 1, H]
        helper.make_node("Add", ["mean", "sum"], ["mixed"]),
        helper.make_node("MatMulNBits", ["mixed", "head", "head_scales"], ["logits"], N=V, **ms, **INT4),
        helper.make_node("Add", ["past_key_values.0.key", "sum"], ["present.0.key"]),
        helper.make_node("Add", ["past_key_values.0.value", "sum"], ["present.0.value"]),
    ]


def float_nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),  # [1, S, H]
        helper.make_node("MatMul", ["x", "up"], ["u"]),
        helper.make_node("ReduceSum", ["u", "last_axes"], ["sum"], keepdims=1),
        helper.make_node("ReduceMean", ["x", "token_axis"], ["mean"], keepdims=1),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
        helper.make_node("Add", ["past_key_values.0.key", "sum"], ["present.0.key"]),
        helper.make_node("Add", ["past_key_values.0.value", "sum"], ["present.0.value"]),
    ]


def write_graph(path: Path, shape: GraphShape, nodes: list[onnx.NodeProto], outside: list[Any]) -> None:
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    inside = [
        numpy_helper.from_array(np.array([1, 2]), "last_axes"),
        numpy_helper.from_array(np.array([1]), "token_axis"),
    ]
    ports = [
        [helper.make_tensor_value_info(port.name, kinds[port.dtype], port.shape) for port in items]
        for items in (input_ports(SPEC, shape), output_ports(SPEC, shape))
    ]
    graph = helper.make_graph(nodes, shape.name, *ports, [*inside, *outside])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def write_weights(path: Path, arrays: Arrays) -> list[onnx.TensorProto]:
    """The file, and a tensor for each array in it; `table` is the head's bytes with two dimensions."""
    tensors, file = [], bytearray()
    for name, array in arrays.items():
        file += bytes(-len(file) % 64)
        shapes = {name: array.shape}
        if name == "head" and array.ndim == 3:
            shapes["table"] = (V, H // 2)
        for alias, dims in shapes.items():
            tensor = TensorProto(name=alias, dims=dims, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            place = {"location": path.name, "offset": len(file), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
        file += array.tobytes()
    path.write_bytes(file)
    return tensors


def write_bundle(bundle: Path, precision: str, nodes: list[onnx.NodeProto], arrays: Arrays) -> Path:
    bundle.mkdir()
    tensors = write_weights(bundle / "weights.data", arrays)
    entries = {}
    for shape in SHAPES:
        write_graph(bundle / f"{shape.name}.onnx", shape, nodes, tensors)
        pairs = [(f"present.0.{kind}", f"past_key_values.0.{kind}") for kind in ("key", "value")]
        entries[shape.name] = GraphEntry(
            shape=shape,
            file=described(bundle, f"{shape.name}.onnx"),
            inputs=input_ports(SPEC, shape),
            outputs=output_ports(SPEC, shape),
            aliases=tuple(Alias(output=o, input=i, same_buffer=True) for o, i in pairs),
        )
    values: dict[str, Any] = {"target": "portable", "precision": precision, "tools": {}, "files": ()}
    manifest = Manifest(
        source=CheckpointSource(id="mock", model_type="mock", checkpoint_sha256="0" * 64),
        model=SPEC,
        graphs=entries,
        weights=Weights(file=described(bundle, "weights.data"), tensors={}),
        calling=Calling(tokens=Tokens(bos=None, stop=()), prompt=None),
        **values,
    )
    (bundle / MANIFEST).write_text(manifest.to_json())
    return bundle


@pytest.fixture
def mock_bundle(tmp_path: Path) -> Callable[..., Path]:
    """`mock_bundle("int4" or "fp32", name=None, change=lambda arrays: None)`: a new bundle in tmp_path."""

    def make(precision: str, name: str | None = None, change: Callable[[Arrays], Any] | None = None) -> Path:
        packs = precision == "int4"
        arrays = quantized_weights() if packs else float_weights()
        if change is not None:
            change(arrays)
        nodes = quantized_nodes() if packs else float_nodes()
        return write_bundle(tmp_path / (name or precision), precision, nodes, arrays)

    return make


@pytest.fixture
def quantized(mock_bundle: Callable[..., Path]) -> Path:
    return mock_bundle("int4")


@pytest.fixture
def floats(mock_bundle: Callable[..., Path]) -> Path:
    return mock_bundle("fp32")
