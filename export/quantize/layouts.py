"""Parts of a quantized weight: the tensors that ops read, and how those are packed.

Four bits are packed two codes a byte, the earlier one in the lower half, as ONNX and ONNX Runtime have it.
Shapes: N rows (outputs of a product, or entries of a table), K columns, L blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from stillgraph.exporter.ir.fold_weights import Origin, Recipe, Tensors, WeightStep
from stillgraph.exporter.quantize.rounding import HALF_STEP, STEP, Format, Quantized, below, quantize
from stillgraph.weight_tensor import Layout

HALF_BYTE = 4  # bits of a code, coarse or fine
CODES = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}


@dataclass(frozen=True)
class Matrix:
    """A weight that is stored quantized: `recipe` makes it as [N, K]."""

    recipe: Recipe
    form: Format

    @property
    def rows(self) -> int:
        return self.recipe.shape[0]

    @property
    def columns(self) -> int:
        return self.recipe.shape[1]

    @property
    def blocks(self) -> int:
        return self.form.blocks(self.columns)

    def quantized(self, tensors: Tensors) -> Quantized:
        """As it was calibrated, row by row of its sources; by the search of `quantize` where it was not."""

        def make() -> Quantized:
            found = [] if self.recipe.steps else [tensors.rounded(s, self.form) for s in self.recipe.sources]
            if not found or None in found:
                return quantize(self.recipe.value(tensors), self.form)
            return below(found)

        quantized: Quantized = tensors.once(self, make)
        return quantized

    def part(
        self, layout: Layout, dtype: ir.DataType, shape: tuple[int, ...], pack: Pack, name: str | None = None
    ) -> Part:
        """name: in place of the layout's, of a part of the same bytes that another op reads."""
        start = f"{self.recipe.name}.int{self.form.bits}"
        return Part(self, f"{start}.{name or layout}", f"{start}.{layout}", layout, dtype, shape, pack)


Pack = Callable[[Quantized], Tensor]


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight. Parts of the same `content` are the same bytes in other shapes."""

    matrix: Matrix
    name: str
    content: str
    layout: Layout
    dtype: ir.DataType
    shape: tuple[int, ...]
    pack: Pack

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * self.dtype.bitwidth // 8)

    @property
    def origin(self) -> Origin:
        """Scales are numbers of 32 bits; codes and zero points have the form's bits, whatever the dtype."""
        recipe, form = self.matrix.recipe, self.matrix.form
        codes = HALF_BYTE if self.layout in ("coarse", "fine") else form.bits
        bits = 32 if self.dtype == ir.DataType.FLOAT else codes
        block = None if self.layout in ("channels", "channel_scales") else form.block
        changes = tuple(step.described() for step in recipe.steps)
        return Origin(recipe.sources, changes, bits, self.layout, block)

    def make(self, tensors: Tensors) -> np.ndarray:
        """The bytes of the tensor, or the tensor, C-contiguous."""
        return self.pack(self.matrix.quantized(tensors)).contiguous().numpy()


def matrix_of(recipe: Recipe, form: Format) -> Matrix:
    """The matrix of a product's right side [K, N], whose last step most often turned it: that is undone."""
    if recipe.steps[-1:] == (turn := WeightStep("Transpose", (1, 0)),):
        return Matrix(Recipe(recipe.sources, recipe.shape[::-1], recipe.dtype, recipe.steps[:-1]), form)
    return Matrix(recipe.then(turn, recipe.shape[::-1]), form)


# For MatMulNBits and, of the same bytes, GatherBlockQuantized. The one wants its codes in three dimensions,
# the other in as many as its scales have; both take scales and zero points in two.


def packed(matrix: Matrix) -> Part:
    """UINT8 [N, L, block * bits / 8]."""
    shape = matrix.rows, matrix.blocks, _bytes(matrix, matrix.form.block)
    return matrix.part("packed", ir.DataType.UINT8, shape, _packed)


def table(matrix: Matrix) -> Part:
    """UINT8 [N, L * block * bits / 8]: `packed`, row by row."""
    shape = matrix.rows, matrix.blocks * _bytes(matrix, matrix.form.block)
    return matrix.part("packed", ir.DataType.UINT8, shape, _packed, name="table")


def scales(matrix: Matrix) -> Part:
    """FLOAT [N, L]."""
    return matrix.part("scales", ir.DataType.FLOAT, (matrix.rows, matrix.blocks), lambda q: q.scales)


def zeros(matrix: Matrix) -> Part | None:
    """UINT8 [N, ceil(L * bits / 8)]; None where symmetric: both ops then take the middle."""
    if matrix.form.symmetric:
        return None
    shape = matrix.rows, _bytes(matrix, matrix.blocks)
    return matrix.part("zeros", ir.DataType.UINT8, shape, lambda q: _halves(_zeros(q), q.form.bits))


# For a head that scores by its upper four bits, and a table of the same bytes. A level of 8 bits is
# `STEP` * coarse + fine, both from -8 to 7.


def coarse(matrix: Matrix) -> Part:
    """UINT8 [N, L, block / 2]: the upper four bits."""
    shape = matrix.rows, matrix.blocks, matrix.form.block // 2
    return matrix.part("coarse", ir.DataType.UINT8, shape, _coarse)


def coarse_table(matrix: Matrix) -> Part:
    """UINT8 [N, L * block / 2]: `coarse`, row by row."""
    shape = matrix.rows, matrix.blocks * matrix.form.block // 2
    return matrix.part("coarse", ir.DataType.UINT8, shape, _coarse, name="coarse_table")


def fine(matrix: Matrix) -> Part:
    """UINT8 [N, L * block / 2]: the lower four bits."""
    shape = matrix.rows, matrix.blocks * matrix.form.block // 2
    return matrix.part("fine", ir.DataType.UINT8, shape, lambda q: _halves((q.codes + HALF_STEP) & 15, 4))


def coarse_scales(matrix: Matrix) -> Part:
    """FLOAT [N, L]: of a coarse level."""
    shape = matrix.rows, matrix.blocks
    return matrix.part("coarse_scales", ir.DataType.FLOAT, shape, lambda q: q.scales * STEP)


def _coarse(quantized: Quantized) -> Tensor:
    return _halves((quantized.codes + HALF_STEP) >> 4, 4)


# For blocked DequantizeLinear along axis 0 of [K, N], which ONNX Runtime fuses with the product after it.


def columns(matrix: Matrix) -> Part:
    """INT4 or INT8 [K, N]; UINT4 or UINT8 where asymmetric."""
    return matrix.part("columns", _codes(matrix), (matrix.columns, matrix.rows), _columns)


def column_scales(matrix: Matrix) -> Part:
    """FLOAT [L, N]."""
    shape = matrix.blocks, matrix.rows
    return matrix.part("column_scales", ir.DataType.FLOAT, shape, lambda q: q.scales.T)


def column_zeros(matrix: Matrix) -> Part | None:
    """UINT4 or UINT8 [L, N]; None where symmetric."""
    if matrix.form.symmetric:
        return None
    shape = matrix.blocks, matrix.rows
    return matrix.part("column_zeros", _codes(matrix), shape, lambda q: _flat(_zeros(q).T, q.form.bits))


def gathered(part: Part) -> Part:
    """A part [.., N] to gather columns of; of four bits, for even N, as UINT8 [.., N / 2].

    The bytes are the same. They have a name of their own because ONNX Runtime fuses no weight that has a
    second reader, and gathers no elements of four bits.
    """
    if part.dtype.bitwidth < 8:
        shape, dtype = (*part.shape[:-1], part.shape[-1] // 2), ir.DataType.UINT8
    else:
        shape, dtype = part.shape, part.dtype
    return replace(part, name=f"{part.name}_gathered", dtype=dtype, shape=shape)


# For products of int8 with int8: one scale a row.


def channels(matrix: Matrix) -> Part:
    """INT8 [K, N]."""
    shape = matrix.columns, matrix.rows
    return matrix.part("channels", ir.DataType.INT8, shape, _columns)


def channel_scales(matrix: Matrix) -> Part:
    """FLOAT [N]."""
    return matrix.part("channel_scales", ir.DataType.FLOAT, (matrix.rows,), lambda q: q.scales.view(-1))


def _codes(matrix: Matrix) -> ir.DataType:
    return ir.DataType[CODES[matrix.form.bits, matrix.form.symmetric]]


def _bytes(matrix: Matrix, codes: int) -> int:
    return -(-codes * matrix.form.bits // 8)


def _zeros(quantized: Quantized) -> Tensor:
    assert quantized.zeros is not None
    return quantized.zeros


def _packed(quantized: Quantized) -> Tensor:
    return _halves(quantized.codes, quantized.form.bits)


def _columns(quantized: Quantized) -> Tensor:
    """Codes [K, N] without the columns that fill the last block; signed where symmetric."""
    codes = quantized.codes[:, : quantized.columns].T.contiguous()
    if quantized.form.symmetric:
        codes ^= quantized.form.middle  # code - middle, as the bits of two's complement
    return _flat(codes, quantized.form.bits)


def _flat(codes: Tensor, bits: int) -> Tensor:
    return _halves(codes.reshape(1, -1), bits)


def _halves(codes: Tensor, bits: int) -> Tensor:
    """Rows of bytes of rows of codes; an odd row ends with half a byte of zeros."""
    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    result = codes[:, 1::2] << 4
    result |= codes[:, 0::2]
    return result
