"""The float64 pass: nothing in it is computed in fp32, and the model is as it was after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.validate import double
from stillgraph.exporter.validate.measures import FEW, CaseMeasures
from stillgraph.exporter.validate.reference import exact_reference, reference

# Of fp32 they return numbers that they were given.
MOVES = set(
    "embedding t view _unsafe_view transpose slice select expand unsqueeze detach _to_copy clone lift_fresh"
    " split alias permute full zeros copy_".split()
)


class Narrow(TorchDispatchMode):
    """Notes every op that returns fp32 while `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.counts and args and isinstance(found, torch.Tensor) and found.dtype == torch.float32:
            rounds = isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
            self.ops.add("rounds" if rounds else func.__name__.split(".")[0])
        return found


@pytest.mark.parametrize("family", ["gemma3", "llama", "qwen3", "gemma2", "granite", "phi3", "olmo2"])
def test_no_op_computes_in_fp32(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = open_checkpoint(str(tiny_checkpoint(family=family))).load()
    narrow, as_it_is = Narrow(), double._as_it_is

    def uncounted(forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = as_it_is(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            narrow.counts = False
            try:
                return inner(*args, **kwargs)
            finally:
                narrow.counts = True

        return call

    monkeypatch.setattr(double, "_as_it_is", uncounted)
    monkeypatch.setattr(double, "PART", 48 * 100)  # the head goes in parts
    ids = np.random.default_rng(0).integers(0, 272, (1, 20))
    with narrow, double.in_double(model):
        exact = reference(model, ids, {3, 19})
    assert narrow.ops - MOVES == set()
    assert "embedding" in narrow.ops  # so that it is seen that something was noted
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all("forward" not in vars(module) for module in model.modules())
    plain = reference(model, ids, {3, 19})
    for position, logits in plain.logits.items():
        np.testing.assert_allclose(exact.logits[position], logits, rtol=0, atol=1e-5)
        assert not np.array_equal(exact.logits[position], logits)


def test_its_own_error_is_that_of_each_slot(tiny_checkpoint: Callable[..., Path]) -> None:
    model = open_checkpoint(str(tiny_checkpoint())).load()
    ids = np.random.default_rng(0).integers(0, 272, (2, 20))
    exact, plain = exact_reference(model, ids, {3, 19}), reference(model, ids, {3, 19})
    assert exact.own is not None
    difference = (plain.keys[1] - exact.keys[1]).astype(np.float64)
    assert difference.any()
    np.testing.assert_allclose(exact.own.keys[1].largest, np.abs(difference).max((1, 3)))
    np.testing.assert_allclose(exact.own.keys[1].squares, np.square(difference).mean((1, 3)))
    off = (plain.logits[19] - exact.logits[19]).astype(np.float64)
    np.testing.assert_allclose(exact.own.logits[19].squares, np.square(off).mean(1))
    scale = np.square(exact.keys[1].astype(np.float64)).mean()
    expected = (
        np.sqrt(np.square(difference).mean() / scale),
        np.abs(difference).max() / np.abs(exact.keys[1]).max(),
        np.sqrt(
            max(np.square(difference[row, :, slot]).mean() for row in (0, 1) for slot in range(20)) / scale
        ),
    )
    np.testing.assert_allclose(exact.own.whole["keys", 1], expected)


@pytest.mark.parametrize("count", [1, FEW - 1, FEW])
def test_few_slots_may_be_as_far_off_as_the_worst_of_the_text(
    tiny_checkpoint: Callable[..., Path], count: int
) -> None:
    model = open_checkpoint(str(tiny_checkpoint())).load()
    exact = exact_reference(model, np.random.default_rng(0).integers(0, 272, (1, 20)), {3})
    assert exact.own is not None
    measures = CaseMeasures(exact)
    measures.slots(1, 0, 0, exact.keys[1][0, :, :count], exact.values[1][0, :, :count])
    (keys, _) = measures.measured()
    assert keys.own is not None
    here = exact.own.keys[1].at((0, slice(0, count)))
    rms, worst, peak = exact.own.whole["keys", 1]
    assert peak > rms
    few = peak if count < FEW else 0.0
    assert keys.own == (max(here.over(keys.truth)[0], rms, few), max(here.over(keys.truth)[1], worst))
