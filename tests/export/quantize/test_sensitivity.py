"""What four bits cost each weight, against the divergence that they really make, and what a budget buys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.exporter.quantize.samples import own_texts
from stillgraph.exporter.quantize.sensitivity import Cost, bits_of, choose, sensitivity

FEW, MANY = Format(4, 32, symmetric=False), Format(8, 32, symmetric=False)


def divergence(model: Any, ids: torch.Tensor, original: torch.Tensor) -> float:
    found = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return float((original.exp() * (original - found)).sum(-1).mean())


@pytest.mark.parametrize("family", ["gemma3", "phi3", "granite", "llava"])
def test_it_foretells_the_divergence_of_each_product(tiny_checkpoint: Any, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family=family)))
    ids = own_texts(checkpoint, 24, 24, lambda line: None)

    def stored(name: str) -> torch.Tensor:
        return quantize(checkpoint.tensor(name), FEW).dequantize()

    costs = sensitivity(checkpoint, stored, ids, lambda line: None)
    model = checkpoint.load()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        original = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        measured = []
        for cost in costs:
            saved = parameters[cost.name].clone()
            parameters[cost.name].copy_(quantize(saved, FEW).dequantize())
            measured.append(divergence(model, ids, original))
            parameters[cost.name].copy_(saved)
    foretold = np.array([cost.nats for cost in costs])
    ratios = foretold / np.array(measured)
    assert len(costs) == 2 * (4 if family == "phi3" else 7)  # layers; Phi 3 has two weights for five
    assert ratios.max() < 2.5
    assert ratios.min() > 0.4
    assert np.corrcoef(np.log(foretold), np.log(measured))[0, 1] > 0.9


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
