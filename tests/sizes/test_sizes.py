"""What the scripts of this folder stand on: checkpoints of a geometry, a process's memory, the page."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stillgraph.exporter.checkpoint import open_checkpoint
from tests.page import keep
from tests.sizes import geometry, growth
from tests.sizes.geometry import Geometry

SMALL = Geometry(hidden=64, inner=96, heads=2, kv_heads=1, window=8, layers=7, head=32, vocabulary=128)


def test_a_checkpoint_has_the_geometry_and_seeded_weights(tmp_path: Path) -> None:
    first = open_checkpoint(str(geometry.write(tmp_path / "first", SMALL)))
    assert [layer.window for layer in first.spec.layers] == [8] * 5 + [None] + [8]
    assert {(layer.kv_heads, layer.head_dim) for layer in first.spec.layers} == {(1, 32)}
    assert (first.spec.hidden_size, first.spec.vocab_size) == (64, 128)
    assert first.tied == "model.embed_tokens.weight"
    again = open_checkpoint(str(geometry.write(tmp_path / "again", SMALL)))
    for name in first.tensors:
        np.testing.assert_array_equal(first.tensor(name).float(), again.tensor(name).float())
    assert float(first.tensor(first.tied).float().std()) == pytest.approx(geometry.SPREAD, rel=0.05)


def test_private_memory_is_seen_apart_from_mapped_files(tmp_path: Path) -> None:
    before, _ = growth._memory(os.getpid())
    held = np.ones(100_000_000, np.uint8)
    during, resident = growth._memory(os.getpid())
    assert during - before == pytest.approx(0.1, abs=0.02)
    assert resident >= during > 0
    del held
    path = tmp_path / "file"
    path.write_bytes(b"1" * 50_000_000)
    mapped = np.memmap(path, np.uint8, "r")
    start = growth._memory(os.getpid())
    assert mapped.sum() == 50_000_000 * ord("1")
    end = growth._memory(os.getpid())
    assert end[0] - start[0] < 0.01 < 0.04 < end[1] - start[1]


def test_the_page_keeps_what_is_around_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- end -->\nafter\n", encoding="ascii")
    row = growth.Grown(2, "int4", 1.5, 0.5, 3.25, 4.0, 61.2)
    keep(path, "<!-- a -->\n", "<!-- end -->\n", growth.render([row]))
    text = path.read_text(encoding="ascii")
    assert text.startswith("before\n<!-- a -->\n| layers |")
    assert "| 2 | int4 | 1.50 | 0.50 | 3.25 | 4.00 | 61 |" in text
    assert "    line [3.25]" in text
    assert text.endswith("<!-- end -->\nafter\n")
