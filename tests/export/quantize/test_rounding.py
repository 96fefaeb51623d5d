"""Codes and scales of matrices: what they stand for, and that the search pays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillgraph.errors import StillgraphError
from stillgraph.exporter.quantize import rounding
from stillgraph.exporter.quantize.rounding import Format, Quantized, quantize

NORMAL = torch.randn(48, 640, generator=torch.Generator().manual_seed(0))
FORMATS = [
    Format(bits, block, symmetric, positive)
    for bits in (4, 8)
    for block in (32, 64, 128)
    for symmetric, positive in ((True, False), (True, True), (False, True))
]


def nearest(matrix: np.ndarray, form: Format) -> np.ndarray:
    """The matrix as plain rounding stores it; K is a multiple of the block."""
    blocks = matrix.reshape(len(matrix), -1, form.block)
    least, most = form.span
    if form.symmetric:
        scale, zero = np.abs(blocks).max(-1, keepdims=True) / most, 0
    else:
        low, high = (
            np.minimum(blocks.min(-1, keepdims=True), 0),
            np.maximum(blocks.max(-1, keepdims=True), 0),
        )
        scale = (high - low) / (most - least)
        zero = np.round(least - low / scale)
    levels = np.clip(np.round(blocks / scale) + zero, least, most) - zero
    return (levels * scale).reshape(matrix.shape)


# With normal weights; a search that finds nothing has a ratio of 1. Measured, for blocks of 32 to 128: 0.82
# to 0.84 with four bits, 0.86 to 0.89 with positive scales, 0.95 with zero points; 0.94 to 0.98 with eight.
RATIOS = {(4, True, False): 0.85, (4, True, True): 0.9, (4, False, True): 0.96}


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_search_beats_nearest(form: Format) -> None:
    exact = NORMAL.numpy()
    searched = np.linalg.norm(quantize(NORMAL, form).dequantize().numpy() - exact)
    bound = RATIOS.get((form.bits, form.symmetric, form.positive), 0.985)
    assert searched / np.linalg.norm(nearest(exact, form) - exact) < bound


@pytest.mark.parametrize("sign", [1, -1])
def test_blocks_on_one_side_of_zero_are_no_worse_than_nearest(sign: int) -> None:
    matrix, form = sign * (NORMAL.abs() + 3), Format(4, 32, symmetric=False)  # their zero point is no code
    searched = np.linalg.norm(quantize(matrix, form).dequantize() - matrix)
    assert searched < np.linalg.norm(nearest(matrix.numpy(), form) - matrix.numpy())


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [200, 256, 7])
def test_dequantize_is_code_less_zero_times_scale(form: Format, columns: int) -> None:
    matrix = torch.randn(5, columns, generator=torch.Generator().manual_seed(1)) + 0.3
    quantized = quantize(matrix, form)
    blocks = -(-columns // form.block)
    assert quantized.codes.shape == (5, blocks * form.block)
    assert quantized.scales.shape == (5, blocks)
    assert (quantized.zeros is None) == form.symmetric
    assert int(quantized.codes.max()) < 2**form.bits
    assert not form.positive or float(quantized.scales.min()) > 0
    expected = np.empty((5, columns), np.float32)
    for row, column in np.ndindex(5, columns):
        block = column // form.block
        zero = form.middle if quantized.zeros is None else int(quantized.zeros[row, block])
        level = np.float32(int(quantized.codes[row, column]) - zero)
        expected[row, column] = level * quantized.scales[row, block].item()
    np.testing.assert_array_equal(quantized.dequantize().numpy(), expected)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_fits_exactly_is_stored_exactly(form: Format) -> None:
    """Whole numbers over the full range of codes, times a power of two."""
    least, most = form.span
    generator = torch.Generator().manual_seed(2)
    levels = torch.randint(least, most + 1, (4, 256), generator=generator).float()
    levels[:, :: form.block], levels[:, 1 :: form.block] = least, most
    if not form.symmetric:  # with zero inside the range, but not in its middle
        levels += 2
    matrix = levels / 4
    # The fitted scale is a quotient of two sums, each rounded some times: a few units of 2**-23.
    torch.testing.assert_close(quantize(matrix, form).dequantize(), matrix, rtol=1e-6, atol=0)


def largest_pair(levels: np.ndarray) -> int:
    """The largest sum of two levels of one sign among four columns that begin at a multiple of four."""
    rows, columns = levels.shape
    fours = np.pad(levels, ((0, 0), (0, -columns % 4))).reshape(rows, -1, 4)
    return max(int(np.sort(np.maximum(sign * fours, 0))[..., -2:].sum(-1).max()) for sign in (1, -1))


@pytest.mark.parametrize("columns", [1, 3, 7, 64, 637])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_pairs_of_a_channel_fit_sixteen_bits(columns: int, spread: float) -> None:
    """255 * 128 is below 2**15, which is where x86 without VNNI cuts a sum of two products off."""
    matrix = torch.randn(64, columns, generator=torch.Generator().manual_seed(4))
    matrix = matrix.sign() * matrix.abs() ** spread  # all alike, normal, and few that tower above the rest
    paired, free = (
        quantize(matrix, form).codes.numpy().astype(int) - 128
        for form in (Format.channel(columns), Format(8, columns))
    )
    assert 255 * largest_pair(paired) < 2**15
    assert np.abs(paired).max() > 62, "range is not given away"
    assert columns < 4 or 255 * largest_pair(free) > 2**15


def test_pairs_cost_a_channel_less_than_a_bit() -> None:
    """For normal weights; half of the range would be twice the error."""
    paired, free = (
        float((quantize(NORMAL, form).dequantize() - NORMAL).norm())
        for form in (Format.channel(640), Format(8, 640))
    )
    assert paired < 1.6 * free


def test_negative_scales_give_the_larger_side_its_extra_code() -> None:
    matrix = torch.tensor([[8.0, *range(-7, 8), *[0] * 16]])
    signed, positive = (quantize(matrix, Format(4, 32, positive=positive)) for positive in (False, True))
    assert float(signed.scales) == -1
    torch.testing.assert_close(signed.dequantize(), matrix, rtol=0, atol=0)
    assert float(positive.scales) > 0
    assert float((positive.dequantize() - matrix).abs().max()) > 0


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-38, -1e-44])
def test_blocks_of_nothing_are_zeros_with_a_scale(form: Format, value: float) -> None:
    matrix = torch.cat([torch.full((3, 100), value), torch.ones(3, 100)], dim=1)
    quantized = quantize(matrix, form)
    np.testing.assert_array_equal(quantized.dequantize()[:, :32], np.zeros((3, 32)))
    assert bool((quantized.scales != 0).all())  # 0 has no inverse, and some runtimes want one


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_is_refused(value: float, symmetric: bool) -> None:
    matrix = NORMAL.clone()
    matrix[40, 600] = value
    with pytest.raises(StillgraphError, match="infinite or not a number"):
        quantize(matrix, Format(4, 32, symmetric))


@pytest.mark.parametrize("form", [Format(4, 32), Format(4, 128, symmetric=False), Format(8, 200)], ids=str)
def test_neither_chunks_nor_dtypes_nor_strides_change_a_number(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = NORMAL[:, :200].bfloat16()
    whole = quantize(matrix, form)
    monkeypatch.setattr(rounding, "CHUNK", 700)  # three rows, and one of them padded to another length
    for other in (matrix, matrix.float(), matrix.t().contiguous().t()):
        same(quantize(other, form), whole)


def same(first: Quantized, second: Quantized) -> None:
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scales, second.scales)
    assert (first.zeros is None) == (second.zeros is None)
    if first.zeros is not None:
        np.testing.assert_array_equal(first.zeros, second.zeros)
