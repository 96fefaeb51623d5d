"""The memory of the machine: what is free, in which pages it comes, and when freed blocks go back to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
LARGE = 1 << 21  # bytes


def free_at_once() -> None:
    """Have blocks over 2 MB go back to the system when they are freed, from now on.

    glibc raises that limit up to 32 MB with the first large block that is freed, and keeps what is under it:
    a tenth of an export's memory, in holes. Other C libraries stay as they are.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no such library, or no such function
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def use_large_pages() -> None:
    """Have torch ask Linux for pages of 2 MB for what is that large, if it has made no such tensor yet.

    A tenth of a calibration's time: pages of 4 kB are made one by one, for every tensor anew.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def available_memory() -> float | None:
    """Bytes that programs can have, swap included. None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemAvailable"] + sizes["SwapFree"]
