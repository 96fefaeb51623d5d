"""Where prompts with pictures may be cut, as small literal lists."""

from __future__ import annotations

import pytest

from stillgraph.chunking import calls, fitting, numbered, units

T = 3
FIRST, SECOND = [-1, -2, -3], [-4, -5, -6]  # input ids of two pictures


@pytest.mark.parametrize(
    ("input_ids", "numbers", "lengths"),
    [
        ([7, 8], [0, 0], [1, 1]),
        ([7, *FIRST, 8], [0, 1, 1, 1, 0], [1, 3, 1]),
        ([*FIRST, *SECOND], [1, 1, 1, 2, 2, 2], [3, 3]),
        ([*SECOND, *SECOND], [1, 1, 1, 2, 2, 2], [3, 3]),  # the same picture twice
        ([*FIRST[1:], 7, *SECOND], [1, 1, 0, 2, 2, 2], [2, 1, 3]),  # the rest of one behind a kept prefix
        ([], [], []),
    ],
)
def test_pictures_come_whole(input_ids: list[int], numbers: list[int], lengths: list[int]) -> None:
    assert numbered(input_ids, T) == numbers
    assert units(input_ids, T) == lengths


def test_pictures_that_may_be_cut() -> None:
    assert units([7, *FIRST, 8], 1) == [1] * 5


@pytest.mark.parametrize(
    ("lengths", "size", "fit", "count"),
    [
        ([1] * 5, 5, 5, 1),
        ([1] * 6, 5, 5, 2),
        ([1, 1, 1, 3, 1], 5, 3, 2),
        ([3, 3, 3], 5, 1, 3),
        ([3, 1, 1, 3], 5, 3, 2),
        ([], 5, 0, 0),
    ],
)
def test_calls_of_a_size(lengths: list[int], size: int, fit: int, count: int) -> None:
    assert fitting(lengths, size) == fit
    assert calls(lengths, size) == count
