"""Products of one input as few products: of neighbors that are stored alike, one for all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STORED = "stored_as"  # the attribute of a linear module that says what its weight is stored in


def mark(model: nn.Module, stored: Callable[[str], Hashable]) -> None:
    """Tell each linear module what `stored` says of its weight's name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            setattr(module, STORED, stored(f"{name}.weight"))


def side_by_side(x: Tensor, modules: Iterable[Any]) -> list[Tensor]:
    """What each linear module makes of x [B, S, K]: [B, S, N] each.

    The concatenation of weights is theirs alone, so it is done once, when the weights are written.
    """
    found = list[Tensor]()
    for _, run in groupby(modules, key=lambda module: getattr(module, STORED, None)):
        alike = list(run)
        if len(alike) == 1:
            found.append(alike[0](x))
            continue
        weight = torch.cat([module.weight for module in alike])
        bias = None if alike[0].bias is None else torch.cat([module.bias for module in alike])
        found += torch.split(functional.linear(x, weight, bias), [len(one.weight) for one in alike], dim=-1)
    return found
