"""Threads that each have a core of their own, and so have the processes that they start.

ONNX Runtime then starts no threads that would spin on the core of another lane.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue


def pool() -> ThreadPoolExecutor:
    """One thread for each core that this process may use."""
    cores: SimpleQueue[int] = SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    return ThreadPoolExecutor(cores.qsize(), initializer=lambda: os.sched_setaffinity(0, {cores.get()}))
