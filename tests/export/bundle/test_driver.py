"""A driver that knows nothing but manifest.json writes the tokens that transformers writes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint_folder import DEMO
from stillgraph.exporter.config import decode_shape, prefill_shape, request

DRIVER = Path(__file__).with_name("own_driver.py")
CHUNK, WINDOW, CTX = 16, 32, 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, portable and in fp32, with a window of two chunks and a cache of two windows."""
    out = tmp_path_factory.mktemp("driven") / "demo"
    config = request(model="demo", target="portable", precision="fp32", batch=1, out=out)
    shapes = [prefill_shape(config, CHUNK, CTX), decode_shape(config, CTX)]
    export(config, shapes, replace=True, say=lambda line: None)
    return out


def driven(bundle: Path, ids: list[int], count: int) -> list[int]:
    """In a process whose only import paths are the standard library's and site-packages'."""
    command = [sys.executable, "-I", str(DRIVER), str(bundle), str(count), *map(str, ids)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=bundle)
    tokens: list[int] = json.loads(done.stdout)
    return tokens


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int, stop: tuple[int, ...]) -> list[int]:
    """The likeliest token after the whole text, again and again: no cache, no padding."""
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in stop):
        tokens.append(int(model(torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens


def test_the_driver_is_short_and_imports_nothing_of_ours() -> None:
    source = DRIVER.read_text()
    assert "stillgraph" not in source
    assert len(source.splitlines()) <= 80


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, WINDOW - 1, WINDOW + 1, 2 * CHUNK + 9])
def test_tokens_are_those_of_transformers(demo: Path, original: Callable[[str], Any], length: int) -> None:
    """Across the edges of a chunk and of the window, some to the last slot of the cache."""
    ids = np.random.default_rng(length).integers(10, 1000, length).tolist()
    count = min(24, CTX - length + 1)
    assert driven(demo, ids, count) == greedy(original(str(DEMO)), ids, count, (1, 5))
    if length == 2 * CHUNK + 9:
        assert length + count == CTX + 1, "the last token came out of the last slot"


def test_a_stop_token_is_the_last_that_is_given_out(demo: Path, original: Callable[[str], Any]) -> None:
    """The stop tokens of the manifest are replaced by a token that the demo writes early."""
    ids = list(range(100, 120))
    tokens = greedy(original(str(DEMO)), ids, 12, ())
    path = demo / "manifest.json"
    whole = path.read_text()
    raw = json.loads(whole)
    assert raw["calling"]["tokens"]["stop"] == [1, 5]
    raw["calling"]["tokens"]["stop"] = [tokens[3]]
    try:
        path.write_text(json.dumps(raw))
        found = driven(demo, ids, 12)
    finally:
        path.write_text(whole)
    assert found == tokens[: tokens.index(tokens[3]) + 1]
