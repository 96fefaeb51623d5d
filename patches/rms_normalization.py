"""RMSNorm as the one op that opset 23 has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    """`LlamaRMSNorm.forward` as RMSNormalization over the last axis."""
    return _normalized(hidden_states, self.weight, self.variance_epsilon)


def shifted_forward(self: Any, x: Tensor) -> Tensor:
    """As `forward`, of the norms that scale by 1 + weight: `Gemma3RMSNorm.forward`."""
    return _normalized(x, 1.0 + self.weight.float(), self.eps)


def _normalized(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    normed: Tensor = torch.onnx.ops.symbolic(
        "RMSNormalization",
        [x, scale],
        attrs={"axis": -1, "epsilon": epsilon},
        dtype=x.dtype,
        shape=x.shape,
        version=23,
    )
    return normed


def rms_normalization(owner: type, shifted: bool = False) -> Patch:
    """Of a class that scales by its weight; shifted: by 1 + weight, as Gemma's do."""
    return Patch(
        name=f"rms_normalization of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "x") if shifted else ("self", "hidden_states"),
        replacement=shifted_forward if shifted else forward,
        reason="one kernel instead of five nodes that a runtime must recognize",
        upstream="https://onnx.ai/onnx/operators/onnx__RMSNormalization.html",
        remove_when="torch exports transformers' norm classes as RMSNormalization",
    )
