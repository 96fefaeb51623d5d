"""Codes that know what they are multiplied with: the error of products is made small, not that of weights.

For inputs x with second moments M = mean of x x^T, a matrix W stored as Q is off by tr(D M D^T), D = W - Q.
Shapes: N rows, K columns, L blocks of a row; everything here has a row for each column, [K, N].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillgraph.exporter.quantize.rounding import Format, Quantized, quantize

DAMPING = 0.01  # of the mean moment, added to each: for directions that few inputs have
BATCH = 128  # columns whose effect on those after them is taken together, as one product
PASSES = 2  # over all scales and codes, after the first rounding: each makes an error less, less each time
SYSTEMS = 1 << 24  # numbers of the equations for scales that are in memory at once
SHARE = 0.5  # of the way to the matrix that makes up for changed inputs: all of it fits the text too closely
LARGEST_CHANGE = 2.0  # of a scale in one pass: of a block that has hardly a code, equations say little


def quantize_for(matrix: Tensor, moments: Tensor, form: Format) -> Quantized:
    """Codes of a matrix [N, K] whose inputs have the second moments [K, K].

    Scales, and zero points, are searched with weights by the root of each input's moment. Then columns are
    rounded one by one, the largest moment first, and each one's error is made up for by those that are left:
    GPTQ (Frantar et al., arXiv 2210.17323). After that scales are fitted to the codes by least squares, and
    each code in turn is made the best beside all others (QuantEase, Behdin et al., arXiv 2309.01885).
    Deterministic for a number of threads. Raises StillgraphError for weights that are not finite.
    """
    assert not form.pair_safe
    damped = _damped(moments)
    first = quantize(matrix, form, damped.diagonal().sqrt())
    order = torch.argsort(damped.diagonal(), descending=True, stable=True)
    damped = damped[order][:, order]
    weights = matrix.to(torch.float32).T[order]
    columns = _Columns.of(first, order)
    _round_in_turn(columns, weights, damped)
    for _ in range(PASSES):
        _fit_scales(columns, weights, damped)
        _improve_codes(columns, weights, damped)
    return columns.quantized(first, order)


def compensated(matrix: Tensor, moments: Tensor, crossed: Tensor) -> Tensor:
    """A matrix [N, K] that makes up for what the rounding of others has done to its inputs.

    For inputs x that have become y, with moments M of y and crossed = mean of x y^T, the products with y are
    nearest to W x for W crossed M^-1 (GPTAQ, Li et al., arXiv 2504.02692). `SHARE` of the way from W is gone.
    """
    mean = moments.diagonal().mean()
    weights = matrix.to(torch.float32)
    if not float(mean) > 0:
        return weights
    pull = weights @ ((crossed - moments) / mean)
    factor = torch.linalg.cholesky(_damped(moments).double())
    return weights + SHARE * torch.cholesky_solve(pull.T.double(), factor).T.to(torch.float32)


def _damped(moments: Tensor) -> Tensor:
    """Moments that have an inverse. Without any input all are alike, as if nothing were known."""
    mean = moments.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(len(moments))
    result = moments / mean
    result.diagonal().add_(DAMPING)
    return result


@dataclass
class _Columns:
    """Levels (codes less zero points) in the order in which columns are rounded, and what bounds them."""

    levels: Tensor  # fp32 [K, N]
    block: Tensor  # int64 [K], of each column
    scales: Tensor  # fp32 [L, N]
    least: Tensor  # fp32 [L, N], or [L, 1] where all are alike
    most: Tensor

    @classmethod
    def of(cls, quantized: Quantized, order: Tensor) -> _Columns:
        form, scales = quantized.form, quantized.scales.T.contiguous()
        zeros = torch.zeros(len(scales), 1)
        if quantized.zeros is not None:
            zeros = quantized.zeros.T.to(torch.float32) - form.middle
        least, most = (bound - zeros for bound in form.span)
        levels = torch.zeros(len(order), scales.shape[1])
        return cls(levels, order // form.block, scales, least, most)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Levels [N] of a column's values in units of its scale."""
        block = int(self.block[column])
        return torch.minimum(torch.maximum(values.round_(), self.least[block]), self.most[block])

    def scale(self, column: int) -> Tensor:
        return self.scales[int(self.block[column])]

    def values(self) -> Tensor:
        """The weights that the levels stand for, [K, N]."""
        return self.levels * self.scales[self.block]

    def by_block(self, values: Tensor) -> Tensor:
        """The sum over each block's columns of [K, N], as [L, N]."""
        return torch.zeros(len(self.scales), values.shape[1]).index_add_(0, self.block, values)

    def quantized(self, first: Quantized, order: Tensor) -> Quantized:
        codes = first.codes.clone()
        zeros = self.least - first.form.span[0]  # [L, N]: minus the zero point less the middle
        unsigned = self.levels - zeros[self.block] + first.form.middle
        codes[:, order] = unsigned.to(torch.uint8).T
        return Quantized(first.form, first.columns, codes, self.scales.T.contiguous(), first.zeros)


def _round_in_turn(columns: _Columns, weights: Tensor, moments: Tensor) -> None:
    """GPTQ's algorithm 1: `inverse` is the upper Cholesky factor of the inverse of the moments."""
    inverse, left = _factor(moments), weights.clone()
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        stop = start + len(batch)
        factor, errors = inverse[start:stop, start:stop], torch.empty_like(batch)
        for index in range(len(batch)):
            scale = columns.scale(start + index)
            level = columns.nearest(batch[index] / scale, start + index)
            columns.levels[start + index] = level
            errors[index] = (batch[index] - level * scale) / factor[index, index]
            batch[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
        left[stop:] -= inverse[start:stop, stop:].T @ errors


def _factor(moments: Tensor) -> Tensor:
    """The upper U with U^T U = M^-1, [K, K]. In float64: moments of real inputs are nearly singular.

    With M = V V^T, V upper, U is V^-1; V is the lower factor of M turned around by both axes.
    """
    turned = torch.linalg.cholesky(moments.double().flip(0, 1))
    identity = torch.eye(len(moments), dtype=torch.float64)
    lower: Tensor = torch.linalg.solve_triangular(turned, identity, upper=False)
    return lower.flip(0, 1).to(torch.float32)


def _fit_scales(columns: _Columns, weights: Tensor, moments: Tensor) -> None:
    """The scales of each row with the least error for its codes: L linear equations a row."""
    blocks = len(columns.scales)
    step = max(1, SYSTEMS // (blocks * blocks))
    for start in range(0, weights.shape[1], step):
        rows = slice(start, start + step)
        levels = columns.levels[:, rows]
        matrix = torch.empty(levels.shape[1], blocks, blocks)
        for block in range(blocks):
            own = columns.block == block
            matrix[:, block] = columns.by_block((moments[:, own] @ levels[own]).mul_(levels)).T
        right = columns.by_block((moments @ weights[:, rows]).mul_(levels)).T
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(-1, keepdim=True) * 1e-6 + 1e-12
        fitted = torch.linalg.solve(matrix, right).T
        former = columns.scales[:, rows]
        change = fitted / former
        usable = (change > 1 / LARGEST_CHANGE) & (change < LARGEST_CHANGE)
        columns.scales[:, rows] = torch.where(usable, fitted, former)


def _improve_codes(columns: _Columns, weights: Tensor, moments: Tensor) -> None:
    """Each code in turn becomes the one with the least error while all others stay."""
    error = weights - columns.values()
    for start in range(0, len(error), BATCH):
        stop = min(start + BATCH, len(error))
        gradient, own = moments[start:stop] @ error, moments[start:stop, start:stop]
        for index in range(stop - start):
            scale, former = columns.scale(start + index), columns.levels[start + index]
            change = gradient[index] / own[index, index] / scale
            level = columns.nearest(former + change, start + index)
            moved = (level - former) * scale
            columns.levels[start + index] = level
            error[start + index] -= moved
            gradient.addr_(own[:, index], moved, alpha=-1)
