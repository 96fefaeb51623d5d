"""What rounding costs each product, against the divergence that it really makes, and what a budget buys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.quantize.rounding import Format
from stillgraph.exporter.quantize.samples import own_texts
from stillgraph.exporter.quantize.sensitivity import (
    Added,
    Cost,
    bits_of,
    choose,
    dearest,
    of_int8_rows,
    of_nearest,
    sensitivity,
)

FEW, MANY = Format(4, 32, symmetric=False), Format(8, 32, symmetric=False)


def divergence(model: Any, ids: torch.Tensor, original: torch.Tensor) -> float:
    found = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return float((original.exp() * (original - found)).sum(-1).mean())


def coarse_rows(name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In 4 bits, since 8 of these small models' inputs cost next to nothing."""
    scale = x.abs().amax(-1, keepdim=True) / 7
    return functional.linear((x / scale).round() * scale - x, weight)


@pytest.mark.parametrize("added", [of_nearest(FEW), coarse_rows], ids=["four bits", "coarse rows"])
@pytest.mark.parametrize("family", ["gemma3", "phi3", "granite", "llava"])
def test_it_foretells_the_divergence_of_each_product(tiny_checkpoint: Any, family: str, added: Added) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family=family)))
    ids = own_texts(checkpoint, 48, 24, lambda line: None)
    (costs,) = sensitivity(checkpoint, [added], ids, lambda line: None)
    model = checkpoint.load()
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    with torch.no_grad():
        original = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        measured = []
        for cost in costs:
            hook = modules[cost.name].register_forward_hook(
                lambda module, x, y, name=cost.name: y + added(name, x[0], module.weight)
            )
            measured.append(divergence(model, ids, original))
            hook.remove()
    foretold = np.array([cost.nats for cost in costs])
    ratios = foretold / np.array(measured)
    assert len(costs) == 2 * (4 if family == "phi3" else 7)  # layers; Phi 3 has two weights for five
    assert ratios.max() < 2.5
    assert ratios.min() > 0.33  # errors of values add up over the tokens that read them
    assert np.corrcoef(np.log(foretold), np.log(measured))[0, 1] > 0.9


def test_a_token_with_one_large_input_is_rounded_coarsely() -> None:
    """The error of a rounded input is uniform over a step of the token's largest one / 127."""
    x, weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), torch.eye(96)
    x[32:, 0] = 100
    steps = of_int8_rows("", x, weight).numpy() / (x.abs().amax(-1, keepdim=True).numpy() / 127)
    assert np.abs(steps).max() <= 0.51
    assert np.sqrt((steps[:, 1:] ** 2).mean()) == pytest.approx(np.sqrt(1 / 12), rel=0.05)
    assert not of_int8_rows("", torch.zeros(2, 96), weight).any()


def cost(name: str, nats: float, numbers: int = 64) -> Cost:
    return Cost(name, numbers, 64, nats)


def test_a_budget_goes_to_the_dearest_bits() -> None:
    costs = [cost("cheap", 0.1), cost("dear", 1.0), cost("large", 3.0, 640), cost("small", 0.5)]
    least = bits_of(FEW, 64)
    names = lambda budget: [one.name for one in choose(costs, FEW, MANY, budget)[0]]  # noqa: E731
    assert names(least) == []
    assert names(least + 0.4) == ["dear"]
    assert names(least + 0.7) == ["dear", "small"]
    assert names(9.3) == ["dear", "small", "large", "cheap"]
    chosen, bits = choose(costs, FEW, MANY, least + 0.7)
    assert bits == pytest.approx(least + sum(one.numbers for one in chosen) * 4.125 / 832)
    assert bits <= least + 0.7


def test_eight_bits_go_to_as_many_weights_as_a_divergence_asks_for() -> None:
    costs = [Cost("dear", 64, 64, 0.25), Cost("cheap", 64, 64, 0.0625), Cost("large", 128, 64, 0.1875)]
    names = lambda kl: [one.name for one in choose(costs, FEW, MANY, None, kl)[0]]  # noqa: E731
    assert names(0.5) == []
    assert names(0.499) == ["dear"]
    assert names(0.25) == ["dear"]
    assert names(0.249) == ["dear", "large"]
    assert names(0.0) == ["dear", "large", "cheap"]
    assert choose(costs, FEW, MANY, None, 0.0)[1] == bits_of(MANY, 64)


def test_bits_count_scales_zero_points_and_what_fills_a_block() -> None:
    assert bits_of(Format(4, 64), 128) == 4.5
    assert bits_of(Format(4, 64, symmetric=False), 128) == 4 + 36 / 64
    assert bits_of(Format(8, 32, symmetric=False), 128) == 8 + 40 / 32
    assert bits_of(Format(4, 128), 192) == (4 * 256 + 2 * 32) / 192


def test_the_fewest_numbers_are_left_out_for_a_divergence() -> None:
    costs = [cost("cheap", 0.125), cost("large", 0.5, 640), cost("small", 0.25)]
    names = lambda kl: [one.name for one in dearest(costs, kl)]  # noqa: E731
    assert names(0.875) == []
    assert names(0.75) == ["small"]
    assert names(0.5) == ["small", "cheap"]
    assert names(0.0) == ["small", "cheap", "large"]
