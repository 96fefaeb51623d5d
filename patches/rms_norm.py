"""RMSNorm as a division by a root, the form that runtimes recognize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    """`LlamaRMSNorm.forward` with x / sqrt(mean(x^2) + eps) for x * rsqrt(mean(x^2) + eps)."""
    wide = hidden_states.float()
    root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    scaled: Tensor = self.weight * (wide / root).type_as(hidden_states)
    return scaled


def shifted_forward(self: Any, x: Tensor) -> Tensor:
    """As `forward`, of the norms that scale by 1 + weight: `Gemma3RMSNorm.forward`."""
    wide = x.float()
    root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    normed: Tensor = wide / root * (1.0 + self.weight.float())
    return normed.type_as(x)


def rms_norm(owner: type, shifted: bool = False) -> Patch:
    """Of a class that scales by its weight; shifted: by 1 + weight, as Gemma's do."""
    return Patch(
        name=f"rms_norm of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "x") if shifted else ("self", "hidden_states"),
        replacement=shifted_forward if shifted else forward,
        reason="ONNX Runtime fuses Sqrt and Div into one kernel, but not the Sqrt and Reciprocal of rsqrt",
        upstream="https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/layer_norm_fusion.cc",
        remove_when="the portable target may use RMSNormalization (opset 23)",
    )
