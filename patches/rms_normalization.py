"""RMSNorm as the one op that opset 23 has for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch


def forward(self: Any, x: Tensor) -> Tensor:
    """`Gemma3RMSNorm.forward` as RMSNormalization over the last axis, scaled by 1 + weight."""
    return _normalized(x, 1.0 + self.weight.float(), self.eps)


def unshifted_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """As `forward`, of the norms that scale by the weight itself and not by 1 + weight."""
    return _normalized(hidden_states, self.weight, self.variance_epsilon)


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


RMS_NORMALIZATION = Patch(
    name="rms_normalization",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3RMSNorm.forward",
    signature=("self", "x"),
    replacement=forward,
    reason="one kernel instead of five nodes that a runtime must recognize",
    upstream="https://onnx.ai/onnx/operators/onnx__RMSNormalization.html",
    remove_when="torch exports transformers' norm classes as RMSNormalization",
)
LLAMA_RMS_NORMALIZATION = replace(
    RMS_NORMALIZATION,
    name="llama_rms_normalization",
    target="transformers.models.llama.modeling_llama:LlamaRMSNorm.forward",
    signature=("self", "hidden_states"),
    replacement=unshifted_forward,
)
QWEN2_RMS_NORMALIZATION = replace(
    LLAMA_RMS_NORMALIZATION,
    name="qwen2_rms_normalization",
    target="transformers.models.qwen2.modeling_qwen2:Qwen2RMSNorm.forward",
)
