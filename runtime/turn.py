"""One caller at a time in an engine, whatever interrupts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.001


class Turn:
    """Whose turn it is. Others are told at once that it is not theirs, or wait.

    CPython handles a signal after a call or at a jump back. Neither comes between the statements here that
    take the turn and those that give it back, so no interrupt leaves it taken for good, as it may a lock that
    is acquired by a call.
    """

    def __init__(self) -> None:
        self._owner: object | None = None
        self._lock = threading.Lock()  # while two compare and store

    @contextmanager
    def taken(self, wait: bool = False) -> Iterator[bool]:
        """Whether the turn was free, for the length of a `with` block. wait: until it is."""
        mine = object()
        try:
            while True:
                with self._lock:
                    if self._owner is None:
                        self._owner = mine
                if self._owner is mine or not wait:
                    break
                time.sleep(POLL_SECONDS)
            yield self._owner is mine
        finally:
            if self._owner is mine:
                self._owner = None
