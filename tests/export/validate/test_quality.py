"""Quantized bundles: the graph's error and the weights' cost are told apart, each with its bound."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stillgraph.exporter.precisions import PRECISIONS
from stillgraph.exporter.validate.gates import rounded_bound
from stillgraph.exporter.validate.metrics import diverge
from stillgraph.exporter.validate.quality import perplexity, summarize
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read

Bundle = Callable[..., Path]


def quietly(line: str) -> None:
    pass


@pytest.fixture
def quantized(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A private copy: validation writes into it, and tests damage it."""
    return Path(shutil.copytree(tiny_bundle(target="onnxruntime", precision="int8"), tmp_path / "bundle"))


def test_the_graph_is_exact_where_inputs_are_not_rounded(quantized: Path) -> None:
    parity = validate(quantized, depth="default", say=quietly)
    assert parity.passed
    off = [case.worst.relative_error for case in parity.cases if not case.optimized]
    on = [case.worst.relative_error for case in parity.cases if case.optimized]
    assert max(off) < 1e-5
    exact = [check.bound for case in parity.cases if not case.optimized for check in case.checks]
    assert 0 < max(exact) < 1e-5
    assert 1e-4 < max(on) < rounded_bound(read(quantized).model)
    assert read(quantized).validation.quality == parity.quality


def test_quality_is_against_the_checkpoint_and_not_against_the_same_weights(quantized: Path) -> None:
    quality = validate(quantized, depth="quick", say=quietly).quality
    assert quality is not None
    assert quality.text
    assert quality.positions == 25  # from the 16th token, the last of the prefill, to the 40th of ctx
    assert 1e-7 < quality.kl < PRECISIONS["int8"].max_kl
    assert quality.perplexity != quality.original_perplexity


def test_a_scale_that_is_not_the_weights_breaks_the_exact_bound(quantized: Path) -> None:
    name, place = next((k, v) for k, v in read(quantized).weights.tensors.items() if k.endswith(".scales"))
    with (quantized / "weights.data").open("r+b") as file:
        file.seek(place.offset)
        scales = np.frombuffer(file.read(place.nbytes), np.float32) * np.float32(1.001)
        file.seek(place.offset)
        file.write(scales.tobytes())
    parity = validate(quantized, depth="default", say=quietly)
    assert not parity.passed, name
    assert "relative error" in (parity.problem() or "")
    assert all(parity.within_bound(case) for case in parity.cases if case.optimized), (
        "too small to be seen there"
    )


def test_a_prefill_with_weights_of_its_own_is_held_to_these(tiny_bundle: Bundle, tmp_path: Path) -> None:
    made = tiny_bundle(target="onnxruntime", precision="int4", fast_prefill=True)
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    parity = validate(bundle, depth="default", say=quietly)
    assert parity.passed
    assert {case.start for case in parity.cases} == {"prefill"}
    steps = {
        own: max(len(c.comparisons) for c in parity.cases if c.int8_activations == own) for own in (0, 1)
    }
    assert steps[0] > 1 == steps[1], "the decode goes on from the prefill that has its weights"


def test_weights_that_cost_too_much_fail(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(PRECISIONS["int8"], max_kl=1e-9)
    monkeypatch.setitem(PRECISIONS, "int8", strict)
    parity = validate(quantized, depth="quick", say=quietly)
    assert not parity.passed
    assert "KL divergence" in (parity.problem() or "")


def test_divergence_of_two_distributions() -> None:
    """By hand: p = (1/2, 1/2), q = (1/4, 3/4)."""
    found = diverge(np.log([0.5, 0.5]), np.log([0.25, 0.75]), token=1)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.nll == pytest.approx(-math.log(0.75))
    assert found.original_nll == pytest.approx(math.log(2))
    assert not found.top1_equal


def test_perplexity_leaves_out_the_end_of_the_text() -> None:
    assert perplexity([math.log(2), None, math.log(8)]) == pytest.approx(4.0)


def test_a_summary_is_of_means() -> None:
    even, skew = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    quality = summarize("int8", [diverge(even, even, 0), diverge(even, skew, 0)], True, (0.5, 0.75))
    assert quality.kl == pytest.approx(diverge(even, skew, 0).kl / 2)
    assert quality.perplexity == pytest.approx(math.exp((math.log(2) + math.log(4)) / 2))
    assert (quality.recall, quality.original_recall) == (0.5, 0.75)
