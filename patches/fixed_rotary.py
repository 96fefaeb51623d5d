"""RoPE of the frequencies that a model starts with, whatever the length of a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of


def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`Phi3RotaryEmbedding.forward` without `dynamic_rope_update`: cos and sin [B, S, R]."""
    angles = position_ids[..., None].float() * self.inv_freq.float()
    both = torch.cat((angles, angles), dim=-1)
    scale = self.attention_scaling
    return (both.cos() * scale).to(x.dtype), (both.sin() * scale).to(x.dtype)


def fixed_rotary(owner: type) -> Patch:
    """Of a rotary embedding whose type is longrope: its short factor."""
    return Patch(
        name=f"fixed_rotary of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "x", "position_ids"),
        replacement=forward,
        reason="longrope chooses its frequencies by the last position, of padding as well, and changes a "
        "buffer; graphs end where the short factor does",
        upstream="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
        remove_when="longrope chooses for a whole model instead of each call",
    )
