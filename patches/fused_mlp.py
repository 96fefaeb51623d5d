"""The gated MLP with one product for gate and up (`side_by_side`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of
from stillgraph.patches.side_by_side import side_by_side


def forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of a gated MLP."""
    gate, up = side_by_side(x, (self.gate_proj, self.up_proj))
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
