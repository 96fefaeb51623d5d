"""Codes that know what they are multiplied with: the error of products is made small, not that of weights.

For inputs x with second moments M = mean of x x^T, a matrix W stored as Q is off by tr(D M D^T), D = W - Q.
Shapes: N rows, K columns, L blocks of a row; everything here has a row for each column, [K, N].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stillgraph.exporter.quantize.rounding import Format, Quantized, quantize

DAMPING = 0.01  # of the mean moment, added to each: for directions that few inputs have
STRIPE = 1024  # columns of a matrix of moments that are made by one product
BATCH = 128  # columns whose effect on those after them is taken together, as one product
PASSES = 2  # over all scales and codes, after the first rounding: each makes an error less, less each time
SYSTEMS = 1 << 24  # numbers of the equations for scales that are in memory at once
SHARE = 0.5  # of the way to the matrix that makes up for changed inputs: all of it fits the text too closely
LARGEST_CHANGE = 2.0  # of a scale in one pass: of a block that has hardly a code, equations say little


@dataclass(frozen=True)
class Moments:
    """What is known of inputs, for all weights that they are multiplied with. Made once: its factor is dear.

    order: int64 [K], the columns in the order in which they are rounded, the largest moment first. damped:
    fp32 [K, K], their second moments in that order, in units of the mean one and with an inverse. factor: the
    upper U with U^T U = damped^-1. mean: 0 where there was no input; all are alike then, as if nothing were
    known.
    """

    order: Tensor
    damped: Tensor
    factor: Tensor
    mean: float

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """Of inputs [tokens, K] in fp32."""
        return cls.of_sums(_gram(inputs) / len(inputs))

    @classmethod
    def of_sums(cls, moments: Tensor) -> Moments:
        """Of second moments [K, K] as they are."""
        mean = float(moments.diagonal().mean())
        damped = moments / mean if mean > 0 else torch.eye(len(moments))
        if mean > 0:
            damped.diagonal().add_(DAMPING)
        order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        damped = damped[order][:, order]
        return cls(order, damped, _factor(damped), mean)

    def importance(self) -> Tensor:
        """The root of each column's moment, [K], as the columns stand in a weight."""
        return torch.empty(len(self.order)).index_copy_(0, self.order, self.damped.diagonal().sqrt())


def quantize_for(matrix: Tensor, moments: Moments, form: Format) -> Quantized:
    """Codes of a matrix [N, K] for inputs with these moments.

    Scales, and zero points, are searched with weights by the root of each input's moment. Then columns are
    rounded one by one, the largest moment first, and each one's error is made up for by those that are left:
    GPTQ (Frantar et al., arXiv 2210.17323). After that scales are fitted to the codes by least squares, and
    each code in turn is made the best beside all others (QuantEase, Behdin et al., arXiv 2309.01885).
    Deterministic for a number of threads. Raises StillgraphError for weights that are not finite.
    """
    assert not form.pair_safe
    first = quantize(matrix, form, moments.importance())
    weights = matrix.to(torch.float32).T[moments.order]
    columns = _Columns.of(first, moments.order)
    _round_in_turn(columns, weights, moments.factor)
    sought = moments.damped @ weights  # the same in every pass
    for _ in range(PASSES):
        _fit_scales(columns, sought, moments.damped)
        _improve_codes(columns, weights, moments.damped)
    return columns.quantized(first, moments.order)


def compensated(matrix: Tensor, changed: Moments, exact: Tensor, met: Tensor) -> Tensor:
    """A matrix [N, K] that makes up for what the rounding of others has done to its inputs.

    exact, met: the inputs [tokens, K] as they were, and what they have become; changed: moments M of these.
    The products with y = met are nearest to W x for W + W mean((x - y) y^T) M^-1 (GPTAQ, Li et al., arXiv
    2504.02692). `SHARE` of the way there is gone.
    """
    weights = matrix.to(torch.float32)
    if not changed.mean > 0:
        return weights
    gone = exact - met
    # W (x - y) y^T, by whichever of its products is smaller first.
    narrow = 2 * len(weights) < weights.shape[1]
    pull = functional.linear(gone, weights).T @ met if narrow else weights @ (gone.T @ met)
    pull = pull[:, changed.order] / (len(met) * changed.mean)
    way = pull @ changed.factor.T @ changed.factor
    result: Tensor = weights.index_add(1, changed.order, way, alpha=SHARE)
    return result


def _gram(inputs: Tensor) -> Tensor:
    """x^T x of inputs [tokens, K], each pair of columns once."""
    size = inputs.shape[1]
    result = torch.empty(size, size)
    for start in range(0, size, STRIPE):
        stop = min(start + STRIPE, size)
        stripe = inputs[:, start:stop].T @ inputs[:, :stop]
        result[start:stop, :stop], result[:stop, start:stop] = stripe, stripe.T
    return result


@dataclass
class _Columns:
    """Levels (codes less zero points) in the order in which columns are rounded, and what bounds them."""

    levels: Tensor  # fp32 [K, N]
    block: Tensor  # int64 [K], of each column
    size: int  # of a block
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
        return cls(levels, order // form.block, form.block, scales, least, most)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """Levels [N] of a column's values in units of its scale."""
        block = int(self.block[column])
        return torch.minimum(torch.maximum(values.round_(), self.least[block]), self.most[block])

    def scale(self, column: int) -> Tensor:
        return self.scales[int(self.block[column])]

    def values(self) -> Tensor:
        """The weights that the levels stand for, [K, N]."""
        return self.levels * self.scales[self.block]

    def quantized(self, first: Quantized, order: Tensor) -> Quantized:
        codes = first.codes.clone()
        zeros = self.least - first.form.span[0]  # [L, N]: minus the zero point less the middle
        unsigned = self.levels - zeros[self.block] + first.form.middle
        codes[:, order] = unsigned.to(torch.uint8).T
        return Quantized(first.form, first.columns, codes, self.scales.T.contiguous(), first.zeros)


def _round_in_turn(columns: _Columns, weights: Tensor, inverse: Tensor) -> None:
    """GPTQ's algorithm 1. inverse: the upper Cholesky factor of the inverse of the moments."""
    left = weights.clone()
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
    """The upper U with U^T U = M^-1, [K, K].

    With M = V V^T, V upper, U is V^-1; V is the lower factor of M turned around by both axes. V in float64:
    moments of real inputs are nearly singular, and V is so only by half the digits.
    """
    lower: Tensor = torch.linalg.cholesky(moments.double().flip(0, 1)).to(torch.float32)
    _invert(lower)
    return lower.flip(0, 1)


def _invert(lower: Tensor) -> None:
    """A lower triangular matrix becomes its inverse, by halves, so that most of it is products."""
    size = len(lower)
    if size <= STRIPE // 4:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(size), upper=False))
        return
    half = size // 2
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(first)
    _invert(last)
    below.copy_(last @ below @ first).neg_()


def _fit_scales(columns: _Columns, sought: Tensor, moments: Tensor) -> None:
    """The scales of each row with the least error for its codes: L linear equations a row. sought: moments
    times weights, [K, N].

    Columns come block by block here, so that a block's are next to each other, and in a symmetric matrix of
    equations each pair of blocks once.
    """
    order = torch.argsort(columns.block, stable=True)
    moments, blocks, size = moments[order][:, order], len(columns.scales), columns.size
    step = max(1, SYSTEMS // (blocks * blocks))
    for start in range(0, sought.shape[1], step):
        rows = slice(start, start + step)
        levels = columns.levels[:, rows][order]
        matrix, products = torch.empty(blocks, blocks, levels.shape[1]), torch.empty_like(levels)
        for block in range(blocks):
            first, stop = block * size, (block + 1) * size
            torch.mm(moments[first:, first:stop], levels[first:stop], out=products[first:])
            sums = _by_block(products[first:].mul_(levels[first:]), size)
            matrix[block, block:], matrix[block:, block] = sums, sums
        matrix = matrix.permute(2, 0, 1).contiguous()
        right = _by_block(sought[:, rows][order].mul_(levels), size).T
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += diagonal.mean(-1, keepdim=True) * 1e-6 + 1e-12
        fitted = torch.linalg.solve(matrix, right).T
        former = columns.scales[:, rows]
        change = fitted / former
        usable = (change > 1 / LARGEST_CHANGE) & (change < LARGEST_CHANGE)
        columns.scales[:, rows] = torch.where(usable, fitted, former)


def _by_block(values: Tensor, size: int) -> Tensor:
    """The sum over each block's rows of [K, N], as [L, N]; the last may be short."""
    whole = len(values) // size * size
    sums = values[:whole].view(-1, size, values.shape[1]).sum(1)
    return sums if whole == len(values) else torch.cat([sums, values[whole:].sum(0, keepdim=True)])


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
