"""Pages of the files that weights are mapped from: in the page cache, and in this process."""

from __future__ import annotations

import ctypes
import logging
import mmap
from pathlib import Path

MADV_POPULATE_READ = 22  # of Linux
# bytes that are read at a time, with no other thread of Python; a multiple of the huge page size
STEP = 1 << 23
log = logging.getLogger("stillgraph")


def read_in(path: Path) -> None:
    """Bring a file into the page cache, in huge pages where the system has them for files.

    A step of few bits is done when memory has delivered its weights, and with 4 KiB pages much of that is
    looking up where they are: Linux maps what lies in the cache as 2 MiB pages as such, but reads a file into
    pages of that size only when asked before the first byte is read. What is in the cache already stays as
    it is, and where memory is in pieces a part comes in small pages.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return
    try:
        with path.open("rb") as file:
            for start in range(0, path.stat().st_size, STEP):
                size = min(STEP, path.stat().st_size - start)
                with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ, offset=start) as part:
                    part.madvise(mmap.MADV_HUGEPAGE)
                    part.madvise(MADV_POPULATE_READ)
    except (OSError, ValueError) as error:  # then it is read when it is wanted
        log.debug("%s is not read in: %s", path, error)


def mappings(path: Path) -> set[tuple[int, int]]:
    """Where a file is mapped in this process: (start, end) addresses; none where the system cannot tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return set()
    name = f" {path.resolve()}"
    spans = (line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(name))
    return {(int(start, 16), int(end, 16)) for start, end in spans}


def populate(spans: set[tuple[int, int]]) -> None:
    """Map every page of these mappings now, so that the first token waits for none.

    Otherwise the first run of a graph takes a page fault for every few pages of its weights. Where the system
    has no MADV_POPULATE_READ (Linux before 5.14, or not Linux) nothing happens, and that first run is slower.
    """
    if not spans:
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in spans:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_POPULATE_READ)
