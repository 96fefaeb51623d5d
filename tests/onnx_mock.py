"""The mock model of mock_model.py as an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from stillgraph.ports import input_ports, output_ports
from stillgraph.spec import GraphShape
from tests.mock_model import spec

Step = tuple[str, list[str], str, dict[str, Any]]  # op, inputs, output, attributes
BALLAST: list[Step] = [
    ("Expand", ["total", "wide"], "spread", {}),
    ("MatMul", ["spread", "ballast"], "product", {}),
    ("ReduceSum", ["product", "axis"], "ballast_sum", {}),
    ("Add", ["total", "ballast_sum"], "sum", {}),
]


def constants_of(shape: GraphShape, vocab: int, ballast_mb: int) -> dict[str, np.ndarray]:
    rows, max_len, capacity = shape.batch, shape.max_len, shape.limit
    constants = {
        "slot": np.arange(capacity, dtype=np.int64)[None],
        "weight": np.arange(1, capacity + 1, dtype=np.float32)[None],
        "zero": np.array(0, np.int64),
        "last": np.array(max_len - 1, np.int64),
        "ones": np.ones((rows,), np.int64),
        "none": np.zeros((rows,), np.int64),
        "two": np.array(2, np.float32),
        "v": np.array(vocab, np.float32),
        "vocab": np.arange(vocab, dtype=np.float32)[None, None],
        "column": np.array([rows, 1], np.int64),
        "row": np.array([rows, capacity], np.int64),
        "buffer": np.array([rows, 1, capacity, 1], np.int64),
        "cell": np.array([rows, 1, 1], np.int64),
        "axis": np.array([1], np.int64),
        "nothing": np.zeros((rows, 1, capacity, 1), np.float32),
    }
    if ballast_mb:
        constants["ballast"] = np.zeros((1024, 256 * ballast_mb), np.float32)
        constants["wide"] = np.array([rows, 1024], np.int64)
    return constants


def steps_of(shape: GraphShape, ballast_mb: int) -> list[Step]:
    past = "past_length" if shape.ctx else "none"
    new = "prompt_length" if shape.role == "prefill" else "ones"
    key, value = [f"past_key_values.0.{kind}" if shape.ctx else "nothing" for kind in ("key", "value")]
    return [
        ("Cast", ["input_ids"], "ids", {"to": TensorProto.FLOAT}),
        ("Reshape", [past, "column"], "start", {}),
        ("Reshape", [new, "column"], "count", {}),
        ("Sub", ["slot", "start"], "source", {}),
        ("Clip", ["source", "zero", "last"], "index", {}),
        ("GatherElements", ["ids", "index"], "taken", {"axis": 1}),
        ("GreaterOrEqual", ["source", "zero"], "after", {}),
        ("Less", ["source", "count"], "before", {}),
        ("And", ["after", "before"], "new", {}),
        ("Reshape", ["new", "buffer"], "written", {}),
        ("Reshape", ["taken", "buffer"], "key", {}),
        ("Mul", ["key", "two"], "value", {}),
        ("Where", ["written", "key", key], "present.0.key", {}),
        ("Where", ["written", "value", value], "present.0.value", {}),
        ("Sub", ["present.0.value", "present.0.key"], "difference", {}),
        ("Reshape", ["difference", "row"], "held", {}),
        ("Mul", ["held", "weight"], "weighted", {}),
        ("Add", ["start", "count"], "end", {}),
        ("Less", ["slot", "end"], "valid", {}),
        ("Cast", ["valid"], "mask", {"to": TensorProto.FLOAT}),
        ("Mul", ["weighted", "mask"], "kept", {}),
        ("ReduceSum", ["kept", "axis"], "total" if ballast_mb else "sum", {}),
        *(BALLAST if ballast_mb else ()),
        ("Mod", ["sum", "v"], "next", {"fmod": 1}),
        ("Reshape", ["next", "cell"], "target", {}),
        ("Sub", ["vocab", "target"], "distance", {}),
        ("Abs", ["distance"], "absolute", {}),
        ("Neg", ["absolute"], "negative", {}),
        ("Sub", ["negative", "two"], "logits", {}),
    ]


def onnx_mock(shape: GraphShape, vocab: int, ballast_mb: int = 0) -> bytes:
    """The graph of a shape, with a matrix of `ballast_mb` that changes nothing."""
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}

    def ports(items: Sequence[Any]) -> list[Any]:
        return [helper.make_tensor_value_info(port.name, kinds[port.dtype], port.shape) for port in items]

    steps, constants = steps_of(shape, ballast_mb), constants_of(shape, vocab, ballast_mb)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in steps],
        shape.name,
        ports(input_ports(spec(vocab), shape)),
        ports(output_ports(spec(vocab), shape)),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())
