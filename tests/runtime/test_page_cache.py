"""Pages of files that are mapped."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from stillgraph import files, loading, page_cache
from stillgraph.files import describe
from stillgraph.manifest import read
from stillgraph.page_cache import mappings, populate, read_in

PAGES = 256
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="/proc and MADV_POPULATE_READ are Linux's"
)


def resident_kb(path: Path) -> int:
    """KiB of a file's mappings that this process has in its page table."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = [part for part in parts if part.split("\n", 1)[0].endswith(f" {path}")]
    return sum(int(kb) for part in ours for kb in re.findall(r"^Rss:\s+(\d+) kB", part, re.MULTILINE))


def cached_pages(path: Path) -> int:
    """Pages of a file that are in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        found = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        address = ctypes.c_void_p(ctypes.addressof(view))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), found) == 0
        del view
    return sum(page & 1 for page in found)


@LINUX
@pytest.mark.parametrize("extra", [0, 1])
def test_a_file_is_read_in_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int) -> None:
    monkeypatch.setattr(page_cache, "STEP", 1 << 21)
    path, size = tmp_path / "weights.data", (5 << 20) + extra
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(path):
        pytest.skip("this file system keeps its files in memory")
    read_in(path)
    assert cached_pages(path) == -(-size // mmap.PAGESIZE)
    assert resident_kb(path) == 0


@LINUX
def test_huge_pages_are_asked_for_before_the_first_byte(tmp_path: Path, monkeypatch: Any) -> None:
    advice = list[int]()

    class Recorded(mmap.mmap):
        def madvise(self, option: int, *span: int) -> None:
            advice.append(option)

    (tmp_path / "weights.data").write_bytes(bytes(PAGES))
    monkeypatch.setattr(mmap, "mmap", Recorded)
    read_in(tmp_path / "weights.data")
    assert advice == [mmap.MADV_HUGEPAGE, page_cache.MADV_POPULATE_READ]


def test_a_load_reads_the_weights_in(bundle_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Path]()
    monkeypatch.setattr(files, "read_in", lambda path: asked.append(path) or read_in(path))
    bundle = bundle_of()
    manifest = read(bundle)
    weights = manifest.weights.model_copy(update={"file": describe(bundle, bundle / "weights.data")})
    (bundle / "manifest.json").write_text(manifest.model_copy(update={"weights": weights}).to_json())
    asked.clear()
    loading.load(bundle, threads=1)
    assert asked == [bundle / "weights.data"]


def naive(data: bytes) -> str:
    """By the description, number by number."""
    digest = hashlib.sha256()
    for start in range(0, len(data), 4096):
        page = data[start : start + 4096].ljust(4096, b"\0")
        words = [int.from_bytes(page[at : at + 8], "little") for at in range(0, 4096, 8)]
        digest.update((sum(words) % 2**64).to_bytes(8, "little"))
    return digest.hexdigest()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 4095, 4096, 4097, (1 << 16) - 3, (1 << 16) + 4096 + 5])
def test_page_sums_are_those_of_the_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(page_cache, "STEP", 1 << 16)
    data = bytes(random.Random(size).randbytes(size))
    (tmp_path / "any").write_bytes(data)
    assert read_in(tmp_path / "any") == naive(data)


def test_page_sums_see_every_flipped_bit_and_every_moved_page(tmp_path: Path) -> None:
    data, path = random.Random(0).randbytes(3 * 4096), tmp_path / "any"
    path.write_bytes(data)
    right = read_in(path)
    damaged = [data[4096:] + data[:4096], data[:4096] * 3, data[:8192] + bytes(4096)]
    for bit in random.Random(1).sample(range(8 * len(data)), 300):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        assert read_in(path) != right


@LINUX
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
