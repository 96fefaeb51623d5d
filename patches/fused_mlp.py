"""The gated MLP with one product for gate and up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillgraph.patches.patch import Patch, forward_of


def forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of a gated MLP; the concatenation is of weights alone, done once when they are written."""
    weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
    bias = None if self.gate_proj.bias is None else torch.cat([self.gate_proj.bias, self.up_proj.bias])
    gate, up = functional.linear(x, weight, bias).chunk(2, dim=-1)
    down: Tensor = self.down_proj(self.act_fn(gate) * up)
    return down


def fused_mlp(owner: type) -> Patch:
    """Of a class with `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""
    return Patch(
        name=f"fused_mlp of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "x"),
        replacement=forward,
        reason="one product quantizes its input once and splits its rows over the cores once",
        upstream="https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py",
        remove_when="transformers fuses gate and up itself",
    )
