"""Numbers of few bits for a matrix: blocks along each row share a scale, and a zero point.

A weight is (code - zero) * scale. Nearest rounding takes the scale from a block's largest weight; here
several scales are tried for each block, each is fitted to its codes by least squares, and the one with the
smallest squared error wins. Shapes: N rows (outputs of a product), K columns (its inputs), L blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from stillgraph.errors import StillgraphError
from stillgraph.exporter.precisions import Bits

STAGE = "quantize"
# Where x86 has no VNNI, vpmaddubsw adds two products of unsigned and signed bytes in 16 bits, and cuts off
# what is over 32767. Activations have codes up to 255, so two levels of one sign may add up to 32767 // 255.
PAIR_SUM = 128
STEP, HALF_STEP = 16, 8  # of coarse levels, in levels of 8 bits; fine ones are from -8 to 7
PAIRED = 4  # columns that such a kernel may pair: its sums end in lanes of 32 bits, of four bytes each
CHUNK = 1 << 18  # weights worked on at once: three buffers of them stay in the cache of a core
TINY = 1e-30  # a block whose largest weight is below is all zeros
# Scales tried, relative to the one at which no weight is clipped. Clipping its largest weight makes the rest
# of a block finer, which pays off often with 4 bits, hardly ever with 8: there the search rarely helps.
FACTORS: dict[Bits, tuple[float, ...]] = {
    4: (1.0, 0.68, 0.74, 0.8, 0.86, 0.92, 0.96, 1.08),
    8: (1.0, 0.9, 0.924, 0.948, 0.972, 1.02),
}
UNCLIPPED = (1.0,)  # where pairs count: clipping the largest gains nothing there


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: bits of a code, weights of a block. symmetric: zero points are in the middle.

    positive: no scale is below zero. A negative scale gives the one code more of the negative side to the
    side where a block's largest weight is; some runtimes refuse it. pair_safe: for products with uint8
    activations, whose sums are then exact on every CPU: no two levels of one sign among `PAIRED` columns add
    up to more than `PAIR_SUM`. It costs a weight that has a large neighbor some of its range. nested: a level
    of 8 bits is 16 times one of four bits, the coarse one, and a fine one of four bits beside it. Fine ones
    are -0.5 in the mean, which with scales of either sign is no bias of what coarse ones alone give.
    """

    bits: Bits
    block: int
    symmetric: bool = True
    positive: bool = False
    pair_safe: bool = False
    nested: bool = False

    @classmethod
    def channel(cls, columns: int) -> Format:
        """One scale a row of 8-bit levels, for products of integers."""
        return cls(8, columns, pair_safe=True)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format, in codes."""
        return 1 << (self.bits - 1)

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest code, less the middle."""
        return -self.middle, self.middle - 1 - (HALF_STEP if self.nested else 0)

    def blocks(self, columns: int) -> int:
        return -(-columns // self.block)


@dataclass(frozen=True)
class Quantized:
    """A matrix of N rows and `columns` columns. Codes are unsigned; behind the last column they mean zero."""

    form: Format
    columns: int
    codes: Tensor  # uint8 [N, L * block]
    scales: Tensor  # fp32 [N, L]
    zeros: Tensor | None  # uint8 [N, L], None where symmetric

    def dequantize(self) -> Tensor:
        """fp32 [N, columns]: exactly what every op that reads the parts has for its weights."""
        rows, blocks = self.scales.shape
        zeros = self.form.middle if self.zeros is None else self.zeros.float().unsqueeze(-1)
        levels = self.codes.view(rows, blocks, self.form.block).float() - zeros
        return (levels * self.scales.unsqueeze(-1)).view(rows, -1)[:, : self.columns]


def below(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one form and of as many columns, one below the other, as one."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Quantized(
        parts[0].form,
        parts[0].columns,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def quantize(matrix: Tensor, form: Format, importance: Tensor | None = None) -> Quantized:
    """Codes of a matrix [N, K] of any float dtype, whose values as fp32 are meant.

    importance: fp32 [K], what a squared error in each column weighs; all alike by default. Peak memory beside
    the result is a few times `CHUNK` weights, or rows. Raises StillgraphError for values that are not finite.
    """
    rows, columns = matrix.shape
    blocks = form.blocks(columns)
    codes = torch.empty(rows, blocks * form.block, dtype=torch.uint8)
    scales = torch.empty(rows, blocks)
    zeros = None if form.symmetric else torch.empty(rows, blocks, dtype=torch.uint8)
    result = Quantized(form, columns, codes, scales, zeros)
    if importance is not None:
        filled = torch.nn.functional.pad(importance, (0, codes.shape[1] - columns))
        importance = filled.view(blocks, form.block)
    step = max(1, CHUNK // codes.shape[1])
    parts = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    # One thread a chunk: torch's own would wait for the slowest after every pass over a chunk.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda part: _fill(result, matrix, part, importance), parts))
    torch.set_num_threads(threads)  # what a thread sets is the default of later threads
    if not bool(torch.isfinite(scales).all()):
        raise StillgraphError(STAGE, "a weight is infinite or not a number", "fix the checkpoint")
    return result


def _fill(result: Quantized, matrix: Tensor, part: slice, importance: Tensor | None) -> None:
    form, blocks = result.form, result.scales.shape[1]
    weights = torch.zeros(part.stop - part.start, blocks * form.block)
    weights[:, : result.columns] = matrix[part]
    levels, scale, zero = _best(weights.view(-1, blocks, form.block), form, importance)
    levels += zero + form.middle
    result.codes[part] = levels.view(weights.shape).to(torch.uint8)
    result.scales[part] = scale.squeeze(-1)
    if result.zeros is not None and isinstance(zero, Tensor):
        result.zeros[part] = (zero + form.middle).to(torch.uint8).squeeze(-1)


def _best(weights: Tensor, form: Format, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Levels (codes less zero point), scale [.., 1] and zero point (less the middle) of blocks [.., block].

    importance: of a row's columns, [L, block]; it weighs every sum. With the scale fitted, a block's squared
    error is sum(w * w) - sum(w * l)**2 / sum(l * l): the gain, the second term, is all that needs comparing.
    """
    bounds = _bounds(weights, form)
    levels, product = torch.empty_like(weights), torch.empty_like(weights)
    best: tuple[Tensor, ...] | None = None
    for factor in UNCLIPPED if form.pair_safe else FACTORS[form.bits]:
        scale, zero = _candidate(*bounds, factor, form)
        fitted, gain = _fit(weights, _round(weights, scale, zero, form, levels), product, importance)
        # A tensor even where it is always 0, so that one line below chooses among all that a candidate has.
        found = gain, fitted, torch.as_tensor(zero)
        if best is None:
            best = found
        else:
            better = gain > best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, scale, chosen = best
    zero = 0.0 if form.symmetric else chosen
    scale, _ = _fit(weights, _round(weights, scale, zero, form, levels), product, importance)
    return levels, torch.where(scale == 0, 1.0, scale), zero


def _bounds(weights: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of blocks; where pairs count, what `PAIR_SUM` has room for instead."""
    low, high = torch.aminmax(weights, dim=-1, keepdim=True)
    if not form.pair_safe:
        return low, high
    # Rounding adds half a level to each of the two, so that their sum gets one level less.
    room = form.span[1] / (PAIR_SUM - 1)
    pairs = [_second(side)[1].amax(-1, keepdim=True) * room for side in (-weights, weights)]
    return torch.minimum(low, -pairs[0]), torch.maximum(high, pairs[1])


def _second(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each `PAIRED` values along the last axis: the second largest, and the sum of the two largest."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % PAIRED))
    a, b, c, d = (padded[..., column::PAIRED] for column in range(PAIRED))
    larger, other = torch.maximum(a, b), torch.maximum(c, d)
    rest = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.maximum(torch.minimum(larger, other), rest)
    return second, torch.maximum(larger, other).add_(second)


def _candidate(low: Tensor, high: Tensor, factor: float, form: Format) -> tuple[Tensor, Tensor | float]:
    """Scale and zero point for blocks from `low` to `high`, `factor` times as coarse as without clipping."""
    least, most = form.span
    if form.symmetric:
        if form.positive:
            scale = torch.maximum(low / least, high / most)
        else:  # the larger side gets the side with one code more, by the sign of the scale
            scale = torch.where(-low >= high, low, high) / least
        scale = _not_tiny(scale)
        if form.nested:  # which has fewer codes on the other side
            other = torch.where(-low >= high, high, low)
            scale = scale * (other / scale / most).clamp(min=1)
        return scale * factor, 0.0
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _not_tiny((high - low) / (most - least)) * factor
    middle = (most + least) / 2 - (low + high) / 2 / scale
    return scale, middle.round_().clamp_(least, most)


def _not_tiny(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < TINY, 1.0, scale)


def _round(weights: Tensor, scale: Tensor, zero: Tensor | float, form: Format, out: Tensor) -> Tensor:
    """Nearest levels of weights, in `out`; a scale of 0 gives levels of 0."""
    least, most = form.span
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    if isinstance(zero, Tensor):
        return torch.addcmul(zero, weights, inverse, out=out).round_().clamp_(least, most).sub_(zero)
    levels = torch.mul(weights, inverse, out=out).round_().clamp_(least, most)
    return _without_large_pairs(levels) if form.pair_safe else levels


def _without_large_pairs(levels: Tensor) -> Tensor:
    """Levels with the larger of two whose sum is over `PAIR_SUM` made smaller, in place.

    A limit of `PAIR_SUM` less the second largest, but at least half of it, holds for every pair of the four.
    """
    columns = levels.shape[-1]
    for sign in (1, -1):
        limit = (PAIR_SUM - _second(levels * sign)[0]).clamp_(min=PAIR_SUM // 2)
        limit = limit.repeat_interleave(PAIRED, -1)[..., :columns]
        if sign > 0:
            torch.minimum(levels, limit, out=levels)
        else:
            torch.maximum(levels, -limit, out=levels)
    return levels


def _fit(
    weights: Tensor, levels: Tensor, product: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scale with the least squared error for given levels, and its gain."""
    dot, square = torch.mul(weights, levels, out=product), levels
    if importance is not None:
        dot, square = dot.mul_(importance), levels * importance
    total = dot.sum(-1, keepdim=True)
    squares = torch.mul(square, levels, out=product).sum(-1, keepdim=True)
    squares = torch.where(squares > 0, squares, 1.0)  # of a block of zeros, whose other sum is 0 too
    return total / squares, total * total / squares
