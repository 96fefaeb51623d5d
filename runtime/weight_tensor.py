"""One weight of a bundle: where it lies in the weights file, what it is made of, and how it is stored."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from stillgraph.spec import Frozen

Layout = Literal[
    "plain",
    "packed",
    "scales",
    "zeros",
    "columns",
    "column_scales",
    "column_zeros",
    "channels",
    "channel_scales",
    "coarse",
    "fine",
    "coarse_scales",
    "smoothing",
]


class WeightChange(Frozen):
    """One operation on a weight before it is stored: `Transpose` by a permutation, `Cast` to an ONNX dtype,
    `Add` or `Mul` a number."""

    op: Literal["Transpose", "Cast", "Add", "Mul"]
    argument: tuple[NonNegativeInt, ...] | float | str


class WeightTensor(Frozen):
    """One weight: where it lies in the weights file, and what it is made of.

    offset, nbytes: its bytes; tensors of the same bytes have the same offset. dtype, shape: what ONNX takes
    it for. sources: tensors of the checkpoint, one below the other in this order; none for a constant of the
    graph's own. changes: done to them together, in this order. layout: `plain`, or a part of the quantized
    matrix that they then are, of N rows, K columns and L blocks of a row: codes row by row (`packed`, the
    last block filled up), their `scales` [N, L] and `zeros`; codes [K, N] (`columns`), with `column_scales`
    [L, N] and `column_zeros`; codes [K, N] (`channels`) with a scale a row (`channel_scales`); codes row by
    row of which `coarse` has the upper four bits and `fine` the lower, each less 8, so that a weight is
    (coarse + fine / 16) times its `coarse_scales` [N, L]. `smoothing` is no weight of a graph: exponents of 2
    that the channels of its first source are divided by, and the columns of the others multiplied by, before
    anything else is done to them; the first is a norm that adds what `changes` adds to its weight, or a
    matrix whose rows are channels. bits: of a stored value: 4 are packed two a byte,
    the earlier one in the lower half, whatever the dtype. block: weights of a row that share a scale, of a
    matrix in blocks.
    """

    offset: NonNegativeInt
    nbytes: NonNegativeInt
    dtype: str
    shape: tuple[NonNegativeInt, ...]
    sources: tuple[str, ...]
    changes: tuple[WeightChange, ...] = ()
    layout: Layout = "plain"
    bits: PositiveInt
    block: PositiveInt | None = None
