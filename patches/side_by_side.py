"""Products of one input as few products: of neighbors that are alike, one for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ALIKE = "alike"  # the attribute of a linear module that is equal in those that may be one product


def mark(model: nn.Module, alike: Callable[[str], Hashable]) -> None:
    """Tell each linear module what `alike` says of its weight's name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            setattr(module, ALIKE, alike(f"{name}.weight"))


def side_by_side(x: Tensor, modules: Iterable[Any]) -> list[Tensor]:
    """What each linear module makes of x [B, S, K]: [B, S, N] each.

    The concatenation of weights is theirs alone, so it is done once, when the weights are written.
    """
    found = list[Tensor]()
    for _, run in groupby(modules, key=lambda module: getattr(module, ALIKE, None)):
        together = list(run)
        if len(together) == 1:
            found.append(together[0](x))
            continue
        weight = torch.cat([module.weight for module in together])
        bias = None if together[0].bias is None else torch.cat([module.bias for module in together])
        rows = [len(module.weight) for module in together]
        found += torch.split(functional.linear(x, weight, bias), rows, dim=-1)
    return found
