"""Nodes that read quantized weights. x is [.., K] and ids [..] of token numbers; weights are [N, K]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from stillgraph.exporter.ir.node_names import name_after
from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize.layouts import Matrix, Part
from stillgraph.exporter.targets import MICROSOFT

ACCURACY = 4  # MatMulNBits: activations in int8, one scale for each block of them
HALVES = 2
Attribute = int | str | Sequence[int]


@dataclass(frozen=True)
class QuantizedRows:
    """x [.., S, K] in uint8 around 128, and the scale [.., S, 1] of each row.

    scaled: that x; x itself may be it times a factor, which is in `scale` as well.
    """

    scaled: ir.Value
    own_scale: ir.Value
    codes: ir.Value
    scale: ir.Value


class Builder:
    """Adds nodes to a graph, in front of the one that they take the place of, and weights to its inputs."""

    def __init__(self, graph: ir.Graph) -> None:
        self.parts: dict[str, Part] = {}
        self.quantized_rows: dict[ir.Value, QuantizedRows] = {}  # by what `int8_product` got
        self.finer_codes: dict[ir.Value, ir.Value] = {}  # with those of its first rows' lower 8 bits behind
        self.scaled_rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # by what `int8_product` made
        self._graph = graph
        self._inputs: dict[str, ir.Value] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def weight(self, part: Part | None) -> ir.Value | None:
        """The graph input of a part; None for none."""
        if part is None:
            return None
        if part.name not in self._inputs:
            value = ir.Value(name=part.name, shape=ir.Shape(part.shape), type=ir.TensorType(part.dtype))
            self._graph.inputs.append(value)
            self.parts[part.name], self._inputs[part.name] = part, value
        return self._inputs[part.name]

    def constant(self, array: np.ndarray, shared: bool = True) -> ir.Value:
        """An initializer in the graph; equal ones are one where they may be shared."""
        key = (array.dtype.str, array.shape, array.tobytes() if shared else len(self._constants))
        if key not in self._constants:
            value = ir.Value(
                name=f"quantized.{len(self._constants)}",
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                const_value=ir.tensor(array),
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """The one output of a new node. Inputs that are None at the end are left out."""
        return self.ops(op_type, inputs, [(shape, dtype)], domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        made: Sequence[tuple[Sequence[int], ir.DataType]],
        domain: str = "",
        **attributes: Attribute,
    ) -> list[ir.Value]:
        """As `op`, for a node of several outputs. made: shape and dtype of each."""
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        outputs = [ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype)) for shape, dtype in made]
        attrs = ir.convenience.convert_attributes(attributes)
        self._nodes.append(ir.Node(domain, op_type, inputs, attrs, outputs=outputs))
        return outputs

    def append_to_graph(self) -> None:
        """Put the nodes made since the last call behind those of the graph."""
        nodes, self._nodes = self._nodes, []
        self._graph.extend(nodes)

    def put_in_place_of(self, node: ir.Node, result: ir.Value) -> None:
        """Insert the nodes made since the last call, with `result` where the node's output was."""
        nodes, self._nodes = self._nodes, []
        name_after(node, nodes)
        ir.convenience.replace_nodes_and_values(self._graph, node, [node], nodes, node.outputs, [result])


def shape_of(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def blocked_product(to: Builder, x: ir.Value, matrix: Matrix) -> ir.Value:
    """x @ W.T by MatMulNBits."""
    parts = [part(matrix) for part in (layouts.packed, layouts.scales, layouts.zeros)]
    return product_of(to, x, matrix, matrix.form.bits, parts)


def product_of(to: Builder, x: ir.Value, matrix: Matrix, bits: int, parts: Sequence[Part | None]) -> ir.Value:
    """MatMulNBits of x by codes of `bits`, with their scales and zero points: [.., N]."""
    return to.op(
        "MatMulNBits",
        [x, *map(to.weight, parts)],
        (*shape_of(x)[:-1], matrix.rows),
        domain=MICROSOFT,
        K=matrix.columns,
        N=matrix.rows,
        bits=bits,
        block_size=matrix.form.block,
        accuracy_level=ACCURACY,
    )


def gather_table(to: Builder, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows [.., K] of W by GatherBlockQuantized, out of the bytes that `blocked_product` reads."""
    parts = [part(matrix) for part in (layouts.table, layouts.scales, layouts.zeros)]
    return rows_of(to, ids, matrix, matrix.form.bits, parts)


def rows_of(to: Builder, ids: ir.Value, matrix: Matrix, bits: int, parts: Sequence[Part | None]) -> ir.Value:
    """GatherBlockQuantized of rows of codes of `bits`, with their scales and zero points: [.., K]."""
    codes, scales, *zeros = map(to.weight, parts)
    whole = matrix.blocks * matrix.form.block
    rows = to.op(
        "GatherBlockQuantized",
        [codes, ids, scales, *zeros],
        (*shape_of(ids), whole),
        domain=MICROSOFT,
        bits=bits,
        block_size=matrix.form.block,
        gather_axis=0,
        quantize_axis=1,
    )
    if whole == matrix.columns:
        return rows
    bounds = [to.constant(np.array([bound])) for bound in (0, matrix.columns, len(shape_of(ids)))]
    return to.op("Slice", [rows, *bounds], (*shape_of(ids), matrix.columns))


def dequantized_product(to: Builder, x: ir.Value, matrix: Matrix) -> ir.Value:
    """x @ W.T by a blocked DequantizeLinear in the layout that ONNX Runtime makes MatMulNBits of."""
    return to.op("MatMul", [x, _dequantized(to, matrix)], (*shape_of(x)[:-1], matrix.rows))


def gather_columns(to: Builder, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows [.., K] of W out of the bytes that `dequantized_product` reads, of which each is a column.

    Columns are gathered and then dequantized; the other way round would dequantize the table at each call.
    ONNX Runtime gathers no four-bit elements, so their bytes are gathered and the halves taken here. With an
    odd N a column has no bytes of its own, and the whole table is dequantized.
    """
    shape = (*shape_of(ids), matrix.columns)
    count = math.prod(shape_of(ids))
    flat = reshaped(to, ids, (count,))
    if matrix.form.bits == 4 and matrix.rows % HALVES:
        columns = to.op("Gather", [_dequantized(to, matrix), flat], (matrix.columns, count), axis=1)
    else:
        columns = _gathered_columns(to, flat, matrix, count)
    return reshaped(to, to.op("Transpose", [columns], (count, matrix.columns), perm=[1, 0]), shape)


def _dequantized(to: Builder, matrix: Matrix) -> ir.Value:
    """W.T [K, N]."""
    weights = [to.weight(p(matrix)) for p in (layouts.columns, layouts.column_scales, layouts.column_zeros)]
    shape = matrix.columns, matrix.rows
    return to.op("DequantizeLinear", weights, shape, axis=0, block_size=matrix.form.block)


def _gathered_columns(to: Builder, ids: ir.Value, matrix: Matrix, count: int) -> ir.Value:
    """Columns [K, count] of W.T."""
    codes = _gathered_codes(to, ids, layouts.columns(matrix), count)
    scales = to.weight(layouts.gathered(layouts.column_scales(matrix)))
    scale = to.op("Gather", [scales, ids], (matrix.blocks, count), axis=1)
    inputs = [codes, scale]
    if (stored := layouts.column_zeros(matrix)) is not None:
        inputs.append(_gathered_codes(to, ids, stored, count))
    elif matrix.form.bits == 4:  # what was signed was made unsigned
        inputs.append(to.constant(np.full((matrix.blocks, count), matrix.form.middle, np.uint8)))
    return to.op("DequantizeLinear", inputs, (matrix.columns, count), axis=0, block_size=matrix.form.block)


def _gathered_codes(to: Builder, ids: ir.Value, part: Part, count: int) -> ir.Value:
    """Columns [.., count] of a part [.., N]; of four bits as uint8, those of INT4 plus 8."""
    shape, uint8, stored = (part.shape[0], count), ir.DataType.UINT8, to.weight(layouts.gathered(part))
    if part.dtype.bitwidth == 8:
        return to.op("Gather", [stored, ids], shape, part.dtype, axis=1)
    half = to.constant(np.array(HALVES))
    place = to.op("Div", [ids, half], (count,), ir.DataType.INT64)
    which = to.op("Mod", [ids, half], (count,), ir.DataType.INT64)
    bits = to.op("Mul", [which, to.constant(np.array(4))], (count,), ir.DataType.INT64)
    shift = to.op("Cast", [bits], (count,), uint8, to=int(uint8))
    both = to.op("Gather", [stored, place], shape, uint8, axis=1)
    shifted = to.op("BitShift", [both, shift], shape, uint8, direction="RIGHT")
    codes = to.op("BitwiseAnd", [shifted, to.constant(np.array(15, np.uint8))], shape, uint8)
    if part.dtype == ir.DataType.UINT4:
        return codes
    return to.op("BitwiseXor", [codes, to.constant(np.array(8, np.uint8))], shape, uint8)


def reshaped(to: Builder, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    if shape_of(value) == shape:
        return value
    dtype = value.dtype
    assert dtype is not None
    return to.op("Reshape", [value, to.constant(np.array(shape))], shape, dtype)
