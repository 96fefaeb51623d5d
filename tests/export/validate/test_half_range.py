"""fp16 where it overflows: what an export keeps in fp32, and what a validation fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillgraph.exporter.bundle import build
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import request
from stillgraph.exporter.trace.half_range import LARGEST, LIMIT, beyond, magnitudes, text_magnitudes
from stillgraph.exporter.validate.driver import GraphRun
from stillgraph.exporter.validate.validate import validate
from stillgraph.exporter.validate.written import WrittenRun
from stillgraph.manifest import read
from stillgraph.spec import GraphShape

Checkpoint = Callable[..., Path]
MLP = "model.layers.1.mlp"
SHAPES = [GraphShape(role=role, max_len=size, ctx=24) for role, size in (("prefill", 8), ("decode", 1))]


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def large(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma with activations of 6e5 in one MLP, and weights that fp16 holds."""
    folder = Path(shutil.copytree(tiny_checkpoint(), tmp_path_factory.mktemp("large") / "tiny"))
    tensors = load_file(folder / "model.safetensors")
    for name, factor in {"up_proj": 2.0**16, "gate_proj": 8.0, "down_proj": 2.0**-8}.items():
        tensors[f"{MLP}.{name}.weight"] *= factor
    assert max(float(tensor.abs().max()) for tensor in tensors.values()) < LARGEST
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def exported(checkpoint: Path, out: Path) -> Path:
    config = request(model=str(checkpoint), target="portable", precision="fp16", batch=1, out=out)
    export(config, SHAPES, replace=True, say=silent)
    return out


@pytest.fixture(scope="module")
def kept(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(large, tmp_path_factory.mktemp("kept") / "bundle")


@pytest.fixture(scope="module")
def overflowing(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As an export makes it that does not measure."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "beyond", lambda _: {})
        return exported(large, tmp_path_factory.mktemp("overflowing") / "bundle")


def logits_of(run: GraphRun) -> np.ndarray:
    """Of a prompt and of the token after it."""
    ids, cache = np.arange(7, 17)[None], run.new_cache()
    first = run.prefill(cache, ids, np.array([9]))
    return np.stack([first, run.decode(cache, ids[:, 9], np.array([9]))])


def test_products_that_leave_the_range_are_kept_in_fp32(kept: Path) -> None:
    manifest = read(kept)
    assert set(manifest.kept_fp32) == {f"{MLP}.up_proj", f"{MLP}.down_proj"}
    assert manifest.kept_fp32[f"{MLP}.down_proj"] > 6e5
    found = logits_of(WrittenRun(kept, manifest, optimized=False))
    assert np.isfinite(found).all()


def test_a_bundle_with_kept_products_passes(kept: Path) -> None:
    parity = validate(kept, depth="quick", say=silent)
    assert parity.passed, parity.problem()
    assert {case.prompt for case in parity.cases if case.as_written} == {1, 8}
    assert 0 < parity.peaks[0].magnitude < LIMIT
    assert parity.kinds[0].largest_fp16 == parity.peaks[0].magnitude


def test_a_graph_that_overflows_fails_and_says_where(overflowing: Path) -> None:
    manifest = read(overflowing)
    assert np.isfinite(logits_of(GraphRun(overflowing, manifest, optimized=False))).all(), "on this CPU"
    assert not np.isfinite(logits_of(WrittenRun(overflowing, manifest, optimized=False))).all()
    parity = validate(overflowing, depth="quick", say=silent)
    assert not parity.passed
    broken = {title for title, _ in parity.broken}
    assert {f"{MLP}.up_proj", f"{MLP}.down_proj"} < broken
    assert any("as written" in title for title in broken)
    assert all(parity.within_bound(case) for case in parity.cases if not case.as_written)
    assert "a magnitude of" in str(dict(parity.broken)[f"{MLP}.down_proj"])
    assert dict(parity.broken)[f"{MLP}.down_proj"].layer == 1


class Two(nn.Module):
    """A product with a bias, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -50.0]]))
            self.first.bias.copy_(torch.tensor([1000.0, 0.0]))
            self.second.weight.copy_(torch.tensor([[1e-3, 1e-3]]))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(input_ids.float()))
        return found


def test_magnitudes_are_of_inputs_and_of_products_without_bias() -> None:
    """By hand: (1, 2) gives 3 and -100, and with the bias 1003; the second product is below its input."""
    found = magnitudes(Two(), [np.array([[1, 2]])])
    assert found == pytest.approx({"first": 100.0, "second": 1003.0})
    assert magnitudes(Two(), [np.array([[1, 2]]), np.array([[0, 4]])])["first"] == pytest.approx(200.0)


@pytest.mark.parametrize("family", ["gemma3", "llama", "phi3", "granite"])
def test_layer_by_layer_it_is_the_same(tiny_checkpoint: Checkpoint, family: str) -> None:
    """Embedding and head are one in the first two."""
    checkpoint = open_checkpoint(str(tiny_checkpoint(family=family)))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 272, (1, length)) for length in (12, 7, 12)]
    found = text_magnitudes(checkpoint, texts)
    assert found == pytest.approx(magnitudes(checkpoint.load(), texts), rel=1e-4)
    assert "lm_head" in found


def test_a_value_that_is_no_number_is_beyond_every_limit() -> None:
    assert pytest.approx(65504 / 8) == LIMIT == LARGEST / 8
    assert set(beyond({"a": LIMIT, "b": 9e3, "c": np.inf, "d": np.nan})) == {"b", "c", "d"}
