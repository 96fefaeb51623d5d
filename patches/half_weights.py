"""Matrices in fp16 while everything around them stays fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from stillgraph.patches.patch import Patch, forward_of


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """`Linear.forward` with weight and input rounded to fp16 and the product widened again."""
    product = functional.linear(input.half(), self.weight.half()).float()
    return product if self.bias is None else product + self.bias


def embedding_forward(self: Any, input: Tensor) -> Tensor:
    """`Embedding.forward` over an fp16 table; rows are widened, never the table."""
    return functional.embedding(input, self.weight.half()).float()


def tied_embedding_forward(self: Any, input: Tensor) -> Tensor:
    """`stillgraph.patches.tied_embedding.forward` over an fp16 table."""
    flat = self.weight.half().t().index_select(1, input.reshape(-1)).float()  # [hidden, B * S]
    rows: Tensor = flat.t().reshape(*input.shape, self.weight.shape[1])
    return rows


_half = partial(
    Patch,
    signature=("self", "input"),
    reason="weights are stored in fp16; all else stays fp32, because Gemma's residual stream overflows fp16",
    upstream="https://github.com/huggingface/transformers/pull/29402",
    remove_when="weight-only precision is chosen by the exporter of torch",
)


def half_linear(owner: type) -> Patch:
    """Of `torch.nn.Linear`."""
    name = f"half_linear of {owner.__name__}"
    return _half(name=name, target=forward_of(owner), replacement=linear_forward)


def half_embedding(owner: type, tied: bool = False) -> Patch:
    """Of `torch.nn.Embedding`; tied: its table is the head's as well, and read as that one is."""
    name = f"half_{'tied_' * tied}embedding of {owner.__name__}"
    replacement = tied_embedding_forward if tied else embedding_forward
    return _half(name=name, target=forward_of(owner), replacement=replacement)
