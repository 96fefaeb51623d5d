"""The probe of memory: a number that can be, and no number for what cannot be asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from runtime.bench import bandwidth
from runtime.bench.bandwidth import read_bandwidth

FLOOR = 0.5  # GB/s: below any machine that this is for, however busy


@pytest.mark.parametrize("threads", [1, 2, 100])
def test_memory_has_a_speed(threads: int) -> None:
    assert FLOOR < read_bandwidth(threads, seconds=0.05, size_mb=16) < 1e5


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pass_reads_every_byte_once(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Else the speed is that of less, or more, than it is said to be."""
    taken: list[tuple[int, int]] = []
    pieces = bandwidth.ThreadPoolExecutor.map

    def watched(pool: Any, read: Any, parts: list[np.ndarray]) -> Any:
        for part in parts:
            start = part.__array_interface__["data"][0]
            taken.append((start, start + part.nbytes))
        return pieces(pool, read, parts)

    monkeypatch.setattr(bandwidth.ThreadPoolExecutor, "map", watched)
    read_bandwidth(threads, seconds=1e-9, size_mb=40)
    taken.sort()
    assert len(taken) >= threads
    assert sum(end - start for start, end in taken) == 40 * 10**6
    assert [end for _, end in taken[:-1]] == [start for start, _ in taken[1:]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("threads", {"threads": 0}),
        ("threads", {"threads": -1}),
        ("seconds", {"seconds": 0.0}),
        ("size_mb", {"size_mb": 0}),
    ],
)
def test_nothing_is_not_measured(
    refused: Callable[..., AbstractContextManager[None]], name: str, values: dict[str, Any]
) -> None:
    with refused("read bandwidth", name):
        read_bandwidth(**({"threads": 1, "seconds": 0.01, "size_mb": 1} | values))
