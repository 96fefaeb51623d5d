"""A head that scores all tokens by the upper four bits of its weights, and the best of them by all eight.

A head is most of what a small model reads for a token: 62 % of Gemma 3 270M's numbers. Here it reads the
coarse half of each weight, and the fine half for the rows of the `refine` best scores. Their logits are those
of eight bits, and so are a greedy choice and one from fewer tokens; the others have the error of four bits.
Weights are [N, K], stored once for the head and for the table that it may be tied to.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize.layouts import HALF_BYTE, Matrix, Part
from stillgraph.exporter.quantize.nodes import Builder, product_of, rows_of, shape_of
from stillgraph.exporter.quantize.rounding import STEP


def refined_scores(to: Builder, x: ir.Value, matrix: Matrix, refine: int) -> ir.Value:
    """x [.., K] @ W.T: of each row [N] the `refine` best by W's eight bits, the others by its upper four."""
    *rows, columns = shape_of(x)
    upper = [layouts.coarse(matrix), layouts.coarse_scales(matrix)]
    scores = product_of(to, x, matrix, HALF_BYTE, upper)
    best, tokens = to.ops(
        "TopK",
        [scores, to.constant(np.array([refine]))],
        [((*rows, refine), ir.DataType.FLOAT), ((*rows, refine), ir.DataType.INT64)],
        sorted=0,
    )
    fine = _gathered(to, layouts.fine(matrix), tokens, matrix)
    column = to.op("Unsqueeze", [x, to.constant(np.array([-1]))], (*rows, columns, 1))
    products = to.op("MatMul", [fine, column], (*rows, refine, 1))
    flat = to.op("Squeeze", [products, to.constant(np.array([-1]))], (*rows, refine))
    rest = to.op("Mul", [flat, to.constant(np.array(1 / STEP, np.float32))], (*rows, refine))
    refined = to.op("Add", [best, rest], (*rows, refine))
    return to.op("ScatterElements", [scores, tokens, refined], (*rows, matrix.rows), axis=-1)


def refined_rows(to: Builder, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows [.., K] of W at its eight bits, out of the bytes that `refined_scores` reads."""
    coarse = _gathered(to, layouts.coarse_table(matrix), ids, matrix)
    fine = _gathered(to, layouts.fine(matrix), ids, matrix)
    rest = to.op("Mul", [fine, to.constant(np.array(1 / STEP, np.float32))], shape_of(fine))
    return to.op("Add", [coarse, rest], shape_of(coarse))


def _gathered(to: Builder, codes: Part, ids: ir.Value, matrix: Matrix) -> ir.Value:
    """Rows [.., K] of codes of four bits, in units of a coarse level's scale."""
    return rows_of(to, ids, matrix, HALF_BYTE, [codes, layouts.coarse_scales(matrix)])
