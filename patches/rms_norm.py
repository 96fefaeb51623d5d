"""RMSNorm as a division by a root, the form that runtimes recognize."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillgraph.patches.patch import Patch


def forward(self: Any, x: Tensor) -> Tensor:
    """`Gemma3RMSNorm.forward` with x / sqrt(mean(x^2) + eps) for x * rsqrt(mean(x^2) + eps)."""
    wide = x.float()
    root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    normed: Tensor = wide / root * (1.0 + self.weight.float())
    return normed.type_as(x)


def unshifted_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """As `forward`, of the norms that scale by the weight itself and not by 1 + weight."""
    wide = hidden_states.float()
    root = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    scaled: Tensor = self.weight * (wide / root).type_as(hidden_states)
    return scaled


RMS_NORM = Patch(
    name="rms_norm",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3RMSNorm.forward",
    signature=("self", "x"),
    replacement=forward,
    reason="ONNX Runtime fuses Sqrt and Div into one kernel, but not the Sqrt and Reciprocal of rsqrt",
    upstream="https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/layer_norm_fusion.cc",
    remove_when="the portable target may use RMSNormalization (opset 23)",
)
LLAMA_RMS_NORM = replace(
    RMS_NORM,
    name="llama_rms_norm",
    target="transformers.models.llama.modeling_llama:LlamaRMSNorm.forward",
    signature=("self", "hidden_states"),
    replacement=unshifted_forward,
)
QWEN2_RMS_NORM = replace(
    LLAMA_RMS_NORM,
    name="qwen2_rms_norm",
    target="transformers.models.qwen2.modeling_qwen2:Qwen2RMSNorm.forward",
)
