"""Pages of a bundle's files: in the page cache, in this process, and whether they are what was written."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
from pathlib import Path

MADV_POPULATE_READ = 22  # of Linux
# bytes that are read at a time, with no other thread of Python; a multiple of the huge page size
STEP = 1 << 23
PAGE = 4096  # bytes that have a sum


def read_in(path: Path) -> str:
    """Bring a file into the page cache, in huge pages where the system has them for files; its page sums.

    The page sums of a file are the SHA-256, in hexadecimal, of one sum for each 4096 bytes: of their
    little-endian 64-bit words, modulo 2^64, written as such a word. The last page is filled up with zeros. It
    takes as long as reading the memory does, 10 GB/s or so, where a hash of all bytes takes 0.4 to 2. Any
    change of a single bit, byte or word, a page that is lost, zeroed, swapped or another's is seen; words of
    one page in another order are not, nor what was made to have the same sums. Raises OSError.

    A step of few bits is done when memory has delivered its weights, and with 4 KiB pages much of that is
    looking up where they are: Linux maps what lies in the cache as 2 MiB pages as such, but reads a file into
    pages of that size only when asked before the first byte is read. What is in the cache already stays as
    it is, and where memory is in pieces a part comes in small pages.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        total = path.stat().st_size
        for start in range(0, total, STEP):
            size = min(STEP, total - start)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=start) as part:
                if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
                    _advise(part, mmap.MADV_HUGEPAGE)
                    _advise(part, MADV_POPULATE_READ)
                digest.update(_sums(part))
    return digest.hexdigest()


def _advise(part: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # an older Linux: then it is read in small pages, when it is wanted
        part.madvise(advice)


def _sums(part: mmap.mmap) -> bytes:
    """The sum of each page; STEP is a whole number of pages."""
    import numpy as np  # the commands that only look at a bundle do not wait for it

    data = np.frombuffer(part, np.uint8)
    whole = data.size // PAGE * PAGE
    sums: bytes = data[:whole].view("<u8").reshape(-1, PAGE // 8).sum(axis=1, dtype="<u8").tobytes()
    if whole == data.size:
        return sums
    last = np.zeros(PAGE, np.uint8)
    last[: data.size - whole] = data[whole:]
    return sums + bytes(last.view("<u8").sum(dtype="<u8").tobytes())


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
