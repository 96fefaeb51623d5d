"""The gated MLP with one product for gate and up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stillgraph.patches.patch import Patch


def forward(self: Any, x: Tensor) -> Tensor:
    """`forward` of a gated MLP; the concatenation is of weights alone, done once when they are written."""
    weight = torch.cat([self.gate_proj.weight, self.up_proj.weight])
    bias = None if self.gate_proj.bias is None else torch.cat([self.gate_proj.bias, self.up_proj.bias])
    gate, up = functional.linear(x, weight, bias).chunk(2, dim=-1)
    down: Tensor = self.down_proj(self.act_fn(gate) * up)
    return down


FUSED_MLP = Patch(
    name="fused_mlp",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3MLP.forward",
    signature=("self", "x"),
    replacement=forward,
    reason="one product quantizes its input once and splits its rows over the cores once",
    upstream="https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py",
    remove_when="transformers fuses gate and up itself",
)
LLAMA_FUSED_MLP = replace(
    FUSED_MLP, name="llama_fused_mlp", target="transformers.models.llama.modeling_llama:LlamaMLP.forward"
)
QWEN2_FUSED_MLP = replace(
    FUSED_MLP, name="qwen2_fused_mlp", target="transformers.models.qwen2.modeling_qwen2:Qwen2MLP.forward"
)
