"""What a session does to memory."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest

from runtime.session import mappings, populate

PAGES = 256


def resident_kb(path: Path) -> int:
    """KiB of a file's mappings that this process has in its page table."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [part for part in parts if part.split("\n", 1)[0].endswith(f" {path}")]
    return sum(int(kb) for part in ours for kb in re.findall(r"^Rss:\s+(\d+) kB", part, re.MULTILINE))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and MADV_POPULATE_READ are Linux's")
def test_populate_maps_every_page_of_the_file_and_of_no_other(tmp_path: Path) -> None:
    paths = [tmp_path / "weights.data", tmp_path / "other.data"]
    for path in paths:
        path.write_bytes(bytes(PAGES * mmap.PAGESIZE))
    maps = []
    for path in paths:
        with path.open("rb") as stream:
            maps.append(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ))
    assert resident_kb(paths[0]) == 0
    populate(mappings(paths[0]))
    assert resident_kb(paths[0]) == PAGES * mmap.PAGESIZE // 1024
    assert resident_kb(paths[1]) == 0
    for mapping in maps:
        mapping.close()
