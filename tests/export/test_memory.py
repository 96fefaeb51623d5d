"""What the machine says of its memory, and that an export does without what is not there."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from stillgraph.exporter.memory import LARGE, M_MMAP_THRESHOLD, available_memory, free_at_once


def test_what_is_free_is_known_here() -> None:
    available = available_memory()
    assert available is None or available > 1e8


def test_large_blocks_go_back_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()

    class Library:
        def mallopt(self, option: int, value: int) -> int:
            asked.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    free_at_once()
    assert asked == [(M_MMAP_THRESHOLD, LARGE)]


@pytest.mark.parametrize("problem", [OSError, TypeError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, problem: type[Exception]) -> None:
    def lacks(name: Any) -> Any:
        raise problem

    monkeypatch.setattr(ctypes, "CDLL", lacks)
    free_at_once()
