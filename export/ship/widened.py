"""Weights of few bits in plain ops, for runtimes whose DequantizeLinear knows no blocks.

Shapes: blocks of `block_size` numbers along one axis share a scale, and a zero point.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

DEQUANTIZE = "DequantizeLinear"
FOURS = (ir.DataType.INT4, ir.DataType.UINT4)


def widen_blocks(graph: ir.Graph) -> int:
    """Replace each DequantizeLinear of blocks by (Cast(x) - zero) * scale, both gathered for every number of
    their block; how many there were."""
    found = [node for node in graph if node.op_type == DEQUANTIZE and "block_size" in node.attributes]
    for node in found:
        _widen(graph, node)
    return len(found)


def widen_tables(graph: ir.Graph) -> int:
    """Make each DequantizeLinear of gathered rows one of their whole table, and gather behind it; how many
    there were. A runtime that folds constants has a table of plain numbers then."""
    found = [(node, gathers) for node in graph if (gathers := _gathers(node))]
    for node, gathers in found:
        rows, side = gathers[0].inputs[1], gathers[0].attributes["axis"].as_int()
        assert rows is not None
        axis = node.attributes["axis"].as_int()
        if axis > side:  # the axes of rows stand there in the place of one
            assert rows.shape is not None
            axis -= len(rows.shape) - 1
        attributes = {"axis": axis, "block_size": node.attributes["block_size"].as_int()}
        tables = [gather.inputs[0] for gather in gathers]
        whole = ir.node(DEQUANTIZE, tables, attributes, name=f"{node.name}.whole")
        taken = ir.node("Gather", [whole.outputs[0], rows], {"axis": side}, name=f"{node.name}.rows")
        for made in (whole, taken):
            made.outputs[0].name = made.name
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [whole, taken], node.outputs, taken.outputs
        )
    return len(found)


def _gathers(node: ir.Node) -> list[ir.Node]:
    """What makes all inputs of a DequantizeLinear, where each is gathered; empty otherwise."""
    makers = [value.producer() for value in node.inputs if value is not None]
    gathers = [maker for maker in makers if maker is not None and maker.op_type == "Gather"]
    return gathers if node.op_type == DEQUANTIZE and len(gathers) == len(makers) else []


def widen_halves(graph: ir.Graph) -> int:
    """Make each weight of fp16, and all that is computed in fp16, fp32; how many weights there were."""
    found = [value for value in graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    for value in found:
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    casts = [node for node in graph if node.op_type == "Cast"]
    for node in casts:
        if node.attributes["to"].as_int() == ir.DataType.FLOAT16.value:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
    for value in (*found, *(output for node in graph for output in node.outputs)):
        if value.dtype == ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return len(found)


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    codes, scales, *zeros = node.inputs
    assert codes is not None
    assert codes.shape is not None
    assert scales is not None
    axis, block = (node.attributes[name].as_int() for name in ("axis", "block_size"))
    count = int(codes.shape[axis])  # type: ignore[arg-type]
    before, at = list[ir.Node](), node.name or DEQUANTIZE
    index = _constant(graph, f"{at}.blocks", np.arange(count) // block)

    def op(op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        name = f"{at}.{len(before)}"
        attrs = ir.convenience.convert_attributes(attributes)
        before.append(ir.Node("", op_type, inputs, attrs, name=name))
        before[-1].outputs[0].name = name
        return before[-1].outputs[0]

    def number(value: ir.Value) -> ir.Value:
        return op("Cast", [_bytes(graph, value)], to=ir.DataType.FLOAT.value)

    def each(value: ir.Value) -> ir.Value:
        return op("Gather", [value, index], axis=axis)

    value = number(codes)
    if zeros and zeros[0] is not None:
        value = op("Sub", [value, each(number(zeros[0]))])
    value = op("Mul", [value, each(scales)])
    ir.convenience.replace_nodes_and_values(graph, node, [node], before, node.outputs, [value])


def _bytes(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A weight of four bits as one of eight, which every runtime can read."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in FOURS:
        return value
    name = f"{value.name}.bytes"
    if name not in graph.initializers:
        _constant(graph, name, tensor.numpy().astype(np.int8))
    return graph.initializers[name]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
    )
    graph.initializers[name] = value
    return value
