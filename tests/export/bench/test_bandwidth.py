"""The probe of memory: a plausible number, and errors for wrong options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest

from stillgraph.exporter.bench import bandwidth
from stillgraph.exporter.bench.bandwidth import read_bandwidth


@pytest.mark.parametrize("threads", [1, 2, 100])
def test_the_speed_is_that_of_the_best_pass(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Passes of 4, 2 and 8 seconds over 16 MB, by a clock of our own."""
    ticks = iter([0.0, 0.0, 4.0, 4.0, 10.0, 12.0, 12.0, 20.0, 28.0, 28.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(ticks))
    assert read_bandwidth(threads, seconds=25.0, size_mb=16) == pytest.approx(16e6 / 2.0 / 1e9)


def test_memory_has_a_speed() -> None:
    assert 0 < read_bandwidth(1, seconds=0.01, size_mb=4) < float("inf")


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
