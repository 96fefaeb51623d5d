"""How fast this machine reads memory: what bounds a decode step, which reads every weight once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from stillgraph.errors import StillgraphError

PIECE = 1 << 24  # bytes that a thread takes at a time: handing out smaller ones takes as long as reading them
SHARES = 4  # pieces a thread, at least, so that none waits long for the slowest


def read_bandwidth(threads: int, seconds: float = 1.0, size_mb: int = 512) -> float:
    """GB/s (10^9 bytes) that `threads` threads read out of `size_mb` MB (10^6 bytes) together.

    The best pass over the buffer within `seconds`, and one pass at least: other load on the machine only
    makes it slower. The buffer is to be several times the last-level cache. Raises StillgraphError for a
    number of threads, seconds or MB that is not above 0.
    """
    for name, value in (("threads", threads), ("seconds", seconds), ("size_mb", size_mb)):
        if not value > 0:
            raise StillgraphError("read bandwidth", f"{name} is {value}", "give more than 0")
    buffer = np.ones(size_mb * 10**6 // 8, np.uint64)  # written: pages that are not are all one page of zeros
    step = max(1, min(PIECE // buffer.itemsize, buffer.size // (SHARES * threads)))
    pieces = [buffer[first : first + step] for first in range(0, buffer.size, step)]
    best, end = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            began = time.perf_counter()
            for _ in pool.map(np.bitwise_or.reduce, pieces):  # numpy releases the GIL meanwhile
                pass
            best = min(best, time.perf_counter() - began)
            if time.perf_counter() >= end:
                return buffer.nbytes / best / 1e9
