"""Products of inputs in 8 bits, one scale a token, with weights of 8 bits, one scale a channel.

x is [.., S, K]: S tokens of a call. Weights are [N, K].
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize.layouts import Matrix
from stillgraph.exporter.quantize.nodes import Builder, QuantizedRows, reshaped, shape_of
from stillgraph.exporter.targets import MICROSOFT

TINY = 1e-30  # for the largest activation of a row of zeros: what 0 / 0 is as uint8 differs by CPU
FIRST = 8  # tokens of a call whose inputs are rounded to 16 bits where they may be far larger than all others
FINER = 254  # steps of the lower 8 of those bits in one of the upper: what is left is half a step at most


def int8_product(to: Builder, x: ir.Value, matrix: Matrix) -> ir.Value:
    """x @ W.T with a scale for each row of x and each row of W; the form's block is a whole row of W.

    The scale of a row of x is its largest magnitude / 127. Rows do not depend on each other, so that what
    stands in the padding of a prompt changes nothing. x is quantized once for all products that read it.
    The first rows of a product that has fewer outputs than inputs have 16 bits, by 8 more rows of codes.
    `scaled_rows` keeps what the result was before each row had its scale, and that scale [.., 1].
    """
    if x not in to.quantized_rows:
        to.quantized_rows[x] = _quantized_rows(to, x)
    rows = to.quantized_rows[x]
    if is_finer(matrix.rows, matrix.columns):
        if x not in to.finer_codes:
            to.finer_codes[x] = _finer_codes(to, rows)
        product = _finer_product(to, to.finer_codes[x], matrix)
    else:
        product = _product_of_codes(to, rows.codes, matrix)
    scaled = to.op("Mul", [product, rows.scale], shape_of(product))
    to.scaled_rows[scaled] = product, rows.scale
    return scaled


def is_finer(rows: int, columns: int) -> bool:
    """Whether the `FIRST` tokens of a call meet a matrix of that size with 16 bits. The inputs of down, which
    are products of two others, are those that the first token of a text has far larger than all others; the
    outputs are copied once more, and where they are the fewer ones that is little."""
    return rows < columns


def _finer_codes(to: Builder, rows: QuantizedRows) -> ir.Value:
    """The codes of rows [.., S, K], and behind them those of what these leave over in the first ones."""
    *outer, tokens, columns = shape_of(rows.codes)
    first = min(FIRST, tokens)
    few = (*outer, first, columns)
    codes = to.op("DequantizeLinear", [_part(to, rows.codes, 0, first), *_units(to)], few)
    quotients = to.op("Div", [_part(to, rows.scaled, 0, first), _part(to, rows.own_scale, 0, first)], few)
    left = to.op("Sub", [quotients, codes], few)
    finer = to.op("QuantizeLinear", [left, *_units(to, 1 / FINER)], few, ir.DataType.UINT8)
    every = (*outer, tokens + first, columns)
    return to.op("Concat", [rows.codes, finer], every, ir.DataType.UINT8, axis=len(outer))


def _finer_product(to: Builder, codes: ir.Value, matrix: Matrix) -> ir.Value:
    """As `_product_of_codes`, of `_finer_codes`."""
    *outer, every, _ = shape_of(codes)
    first = min(FIRST, every // 2)
    tokens = every - first
    product = _product_of_codes(to, codes, matrix)
    below = _part(to, product, tokens, every)
    below = to.op("Mul", [below, to.constant(np.array(1 / FINER, np.float32))], shape_of(below))
    places = to.constant(np.moveaxis(np.indices((*outer, first)), 0, -1))
    rows = _part(to, product, 0, tokens)
    return to.op("ScatterND", [rows, places, below], shape_of(rows), reduction="add")


def _units(to: Builder, step: float = 1) -> list[ir.Value]:
    """One scale for all, and the zero point of codes."""
    return [to.constant(np.array(step, np.float32)), to.constant(np.array(128, np.uint8))]


def _part(to: Builder, x: ir.Value, start: int, stop: int) -> ir.Value:
    """Rows of x [.., S, K] from start to stop."""
    *outer, _, columns = shape_of(x)
    bounds = [to.constant(np.array([bound])) for bound in (start, stop, len(outer))]
    assert x.dtype is not None
    return to.op("Slice", [x, *bounds], (*outer, stop - start, columns), x.dtype)


def _product_of_codes(to: Builder, codes: ir.Value, matrix: Matrix) -> ir.Value:
    """Codes times W.T, before the scales of rows."""
    weights, scales = to.weight(layouts.channels(matrix)), to.weight(layouts.channel_scales(matrix))
    one, middle = _units(to)
    inputs, shape = [codes, weights, one, scales, middle], (*shape_of(codes)[:-1], matrix.rows)
    return to.op("MatMulIntegerToFloat", inputs, shape, domain=MICROSOFT)


def _quantized_rows(to: Builder, x: ir.Value) -> QuantizedRows:
    """Codes are unsigned, because products of signed activations are slow on x86. Where x is something times
    a product with a scale for each row, they are made before that scale, which they do not depend on."""
    x, factor = _without_scale(to, x)
    *rows, columns = shape_of(x)
    last, count = (*rows, 1), math.prod(rows)
    magnitudes = to.op("Abs", [x], (*rows, columns))
    largest = to.op("ReduceMax", [magnitudes, to.constant(np.array([-1]))], last, keepdims=1)
    above = to.op("Max", [largest, to.constant(np.array(TINY, np.float32))], last)
    own = scale = to.op("Mul", [above, to.constant(np.array(1 / 127, np.float32))], last)
    flat = (*rows, columns) if count == rows[-1] else (count, columns)  # scales lie along one axis
    zeros = to.constant(np.full(count, 128, np.uint8))
    inputs = [reshaped(to, x, flat), reshaped(to, scale, (count,)), zeros]
    codes = to.op("QuantizeLinear", inputs, flat, ir.DataType.UINT8, axis=len(flat) - 2)
    if factor is not None:
        scale = to.op("Mul", [scale, factor], last)
    return QuantizedRows(x, own, reshaped(to, codes, (*rows, columns)), scale)


def _without_scale(to: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """x without the scale of its rows, and that scale [.., 1]; x and None where it has none of its own."""
    node = x.producer()
    if node is None or node.op_type != "Mul":
        return x, None
    for value, other in (node.inputs, node.inputs[::-1]):
        if value in to.scaled_rows and other is not None and shape_of(other) == shape_of(value):
            product, scale = to.scaled_rows[value]
            return to.op("Mul", [other, product], shape_of(x)), scale
    return x, None
