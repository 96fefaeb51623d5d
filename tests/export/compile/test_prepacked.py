"""The file of packed weights, and the entries of external data that point into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto

from stillgraph.exporter.compile.prepacked import PackedFile, moved, packed_entries


def test_a_file_has_every_blob_once_and_a_page_for_each(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"aaaabbbbaaaa")
    packed = PackedFile(tmp_path / "packed")
    with (tmp_path / "source").open("rb") as source:
        # A kernel with two buffers for a weight, and a checksum that is kept as it is.
        assert moved("Op+12|0;4;7|4;4;8", source, packed) == "Op+12|0;4;7|4096;4;8"
        assert packed.put(source, 8, 4) == 0
    assert packed.close() == 4100
    assert (tmp_path / "packed").read_bytes() == b"aaaa" + bytes(4092) + b"bbbb"


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"aa")
    with (tmp_path / "source").open("rb") as source, pytest.raises(EOFError, match="ends before"):
        PackedFile(tmp_path / "packed").put(source, 0, 4)


def test_entries_of_packed_blobs() -> None:
    tensor = TensorProto()
    for key in ("location", "prepacked_0", "prepacked_1"):
        tensor.external_data.add(key=key, value="value")
    assert [name for name, _ in packed_entries(tensor)] == ["prepacked_0", "prepacked_1"]
