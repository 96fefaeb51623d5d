"""RMSNorm as the one op that opset 23 has for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patches.patch import Patch


def forward(self: Any, x: Tensor) -> Tensor:
    """`Gemma3RMSNorm.forward` as RMSNormalization over the last axis, scaled by 1 + weight."""
    normed: Tensor = torch.onnx.ops.symbolic(
        "RMSNormalization",
        [x, 1.0 + self.weight.float()],
        attrs={"axis": -1, "epsilon": self.eps},
        dtype=x.dtype,
        shape=x.shape,
        version=23,
    )
    return normed


RMS_NORMALIZATION = Patch(
    name="rms_normalization",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3RMSNorm.forward",
    signature=("self", "x"),
    replacement=forward,
    reason="one kernel instead of five nodes that a runtime must recognise",
    upstream="https://onnx.ai/onnx/operators/onnx__RMSNormalization.html",
    remove_when="torch exports transformers' norm classes as RMSNormalization",
)
