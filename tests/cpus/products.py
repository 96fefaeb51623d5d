"""Every form of a product with quantized weights, of given codes, and the sums that it has to give.

Activations are whole numbers of which 127 is the largest in every block, so that rounding them to 8 bits
changes nothing. Scales are 1/2 and 1, and sums in halves stay below 2**24, which fp32 holds exactly. So what
a graph gives is compared with sums of integers, bit for bit, whatever the kernels of a CPU do on the way.
Shapes: M rows of x, or ids of a gather; K columns; N rows of weights, L blocks of each; F calls of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch

from stillgraph.exporter import weights
from stillgraph.exporter.ir.fold_weights import Recipe
from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize import nodes as ops
from stillgraph.exporter.quantize.int8_rows import int8_product
from stillgraph.exporter.quantize.layouts import Matrix
from stillgraph.exporter.quantize.lower import IR_VERSION, StoragePlan
from stillgraph.exporter.quantize.rounding import Format, Quantized, _without_large_pairs
from stillgraph.exporter.targets import MICROSOFT
from stillgraph.manifest import Precision, Quantization, Target

LARGEST = 127  # of an activation: its scale is 1
COLUMNS = (67, 130, 200, 256)  # odd; no multiple of 4; no multiple of a block; whole blocks
ROWS = (1, 3, 128)  # a decode, the tail of a kernel's block of rows, a prefill
ENTRIES = 37  # rows of weights: odd, and over two registers of the widest kernel
EVEN = 38  # of a portable gather of 4 bits, which takes another way than with an odd number
EXACT = 1 << 24  # fp32 holds all whole numbers up to here
QUADS = {4: (7, 1, -8, 0), 8: (127, 1, -127, -1)}  # pairs at the limit of the rule for pairs, of either sign
PATTERNS = ("all +", "all -", "alternating", "pairs", "random", "random too")

Op = Callable[[ops.Builder, ir.Value, Matrix], ir.Value]
OPS: dict[str, Op] = {
    "channel": int8_product,
    "blocked": ops.blocked_product,
    "dequantized": ops.dequantized_product,
    "table": ops.gather_table,
    "columns": ops.gather_columns,
}
GATHERS = ("table", "columns")
TARGETS: dict[str, Target] = {"dequantized": "portable", "columns": "portable"}


@dataclass(frozen=True)
class Case:
    """One graph: an op of `OPS` on weights [N, K] of a format, for M rows. entries: N."""

    op: str
    form: Format
    columns: int = 96
    rows: int = 3
    entries: int = ENTRIES

    @property
    def product(self) -> str:
        """The product form, whatever the sizes: `blocked int4 b32 asymmetric`."""
        if self.op == "channel":
            return "channel int8" if self.form.pair_safe else "channel int8 full range"
        zeros = "symmetric" if self.form.symmetric else "asymmetric"
        return f"{self.op} int{self.form.bits} b{self.form.block} {zeros}"

    @property
    def name(self) -> str:
        return f"{self.product} k{self.columns} m{self.rows} n{self.entries}".replace(" ", "-")


def cases() -> list[Case]:
    """Every product form that a graph of ours can hold, in every size."""
    found = [Case("channel", Format.channel(k), k, m) for k in COLUMNS for m in ROWS]
    for op in ("blocked", "dequantized", *GATHERS):
        for form in _forms(TARGETS.get(op, "onnxruntime")):
            sizes = [(len(PATTERNS), n) for n in (ENTRIES, EVEN)] if op in GATHERS else []
            sizes = sizes or [(m, ENTRIES) for m in ROWS]
            found += [Case(op, form, k, rows, n) for k in COLUMNS for rows, n in sizes]
    return found


def full_range() -> Case:
    """What a graph of ours does not hold: channels with codes of which two are too much for 16 bits."""
    return Case("channel", Format(8, 96), 96)


def _forms(target: Target) -> list[Format]:
    how = [(block, symmetric) for block in (32, 64, 128) for symmetric in (True, False)]
    precisions: tuple[Precision, ...] = ("int4", "int8")
    return [
        StoragePlan(target, precision, Quantization(block_size=block, symmetric=symmetric)).form(precision)
        for precision in precisions
        for block, symmetric in how
    ]


def build(
    case: Case, folder: Path, quantized: Quantized | None = None, feeds: np.ndarray | None = None
) -> None:
    """Write graph.onnx, its weights, and case.npz: feeds [F, ..] and weights [N, K] in halves.

    quantized, feeds: in place of those that the case has by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    quantized = quantized or given(case)
    _write_graph(case, quantized, folder)
    halves = quantized.dequantize().double().numpy() * 2
    assert LARGEST * np.abs(halves).sum(-1).max() < EXACT
    if feeds is None:
        ids = np.arange(2 * case.rows).reshape(2, case.rows) % case.entries
        feeds = ids if case.op in GATHERS else _activations(case)
    np.savez(folder / "case.npz", feeds=feeds, weights=halves)


def _write_graph(case: Case, quantized: Quantized, folder: Path) -> None:
    gather = case.op in GATHERS
    fp32, int64 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
    shape = (case.rows,) if gather else (case.rows, case.columns)
    width = case.columns if gather else case.entries
    x = ir.Value(name="x", shape=ir.Shape(shape), type=int64 if gather else fp32)
    y = ir.Value(name="y", shape=ir.Shape((case.rows, width)), type=fp32)
    placeholder = ir.Node("", "Identity", [x], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[placeholder], opset_imports={"": 21, MICROSOFT: 1}, name="product")
    builder = ops.Builder(graph)
    matrix = Matrix(Recipe(("w.weight",), (case.entries, case.columns)), case.form)
    builder.put_in_place_of(placeholder, OPS[case.op](builder, x, matrix))
    model = ir.Model(graph, ir_version=IR_VERSION)
    (folder / weights.WEIGHTS_FILE).unlink(missing_ok=True)
    with mock.patch.object(layouts, "quantize", return_value=quantized):
        stored = weights.write(
            folder, list(builder.parts.values()), lambda name: torch.zeros(case.entries, case.columns)
        )
    weights.save_graph(model, stored, folder / "graph.onnx")


def given(case: Case, levels: np.ndarray | None = None) -> Quantized:
    """Weights with scales of 1 and 1/2, of levels (codes less zero points) [N, K]; None: of `PATTERNS`."""
    form, blocks = case.form, case.form.blocks(case.columns)
    shape = case.entries, blocks, form.block
    zeros = np.full(shape[:2], form.middle)
    if levels is None:
        levels, zeros = _patterns(case)
    if form.pair_safe:  # as `quantize` leaves them
        levels = _without_large_pairs(torch.from_numpy(levels.copy())).numpy()
    padded = np.pad(levels, ((0, 0), (0, blocks * form.block - case.columns)))
    codes = padded.reshape(shape) + zeros[..., None]
    assert codes.min() >= 0
    assert codes.max() < 2 * form.middle
    row, block = np.indices(shape[:2])
    signs = np.where((row % 3 == 0) & (not form.positive), -1, 1)
    return Quantized(
        form,
        case.columns,
        torch.from_numpy(codes.reshape(case.entries, -1).astype(np.uint8)),
        torch.from_numpy((np.where((row + block) % 2, 0.5, 1.0) * signs).astype(np.float32)),
        None if form.symmetric else torch.from_numpy(zeros.astype(np.uint8)),
    )


def _patterns(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Levels [N, K] and zero points [N, L]: row r has the largest levels, in pattern r of `PATTERNS`."""
    form, rng = case.form, np.random.default_rng(case.columns)
    top, shape = 2 * form.middle - 1, (case.entries, case.columns)
    blocks = np.arange(case.columns) // form.block
    zeros = np.full((case.entries, form.blocks(case.columns)), form.middle)
    kind = np.arange(case.entries) % len(PATTERNS)
    if not form.symmetric:
        zeros[kind == 0], zeros[kind == 1] = 0, top
        zeros[kind >= 4] = rng.integers(0, top + 1, zeros[kind >= 4].shape)
    codes = rng.integers(0, top + 1, shape)
    codes[kind == 0], codes[kind == 1] = top, 0
    codes[kind == 2] = np.where(np.arange(case.columns) % 2, 0, top)
    codes[kind == 3] = form.middle + np.resize(QUADS[form.bits], case.columns)
    return codes - zeros[:, blocks], zeros


def _activations(case: Case) -> np.ndarray:
    """fp32 [F, M, K]: every pattern in every row of x, or once in each of many."""
    rng = np.random.default_rng(case.rows)
    column = np.arange(case.columns)
    signs = np.stack([column >= 0, column < 0, column % 2 == 0, column % 4 < 2])
    x = np.concatenate([np.where(signs, LARGEST, -LARGEST), rng.integers(-127, 128, (2, case.columns))])
    x[-2:, ::32] = LARGEST  # the smallest block has 32
    calls = -(-len(x) // case.rows)
    return np.resize(x, (calls, case.rows, case.columns)).astype(np.float32)
