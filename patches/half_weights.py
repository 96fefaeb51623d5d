"""Matrices in fp16 while everything around them stays fp32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from stillgraph.patches.patch import Patch


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """`Linear.forward` with weight and input rounded to fp16 and the product widened again."""
    product = functional.linear(input.half(), self.weight.half()).float()
    return product if self.bias is None else product + self.bias


def embedding_forward(self: Any, input_ids: Tensor) -> Tensor:
    """`Gemma3TextScaledWordEmbedding.forward` over an fp16 table; rows are widened, never the table."""
    scaled: Tensor = plain_embedding_forward(self, input_ids) * self.embed_scale
    return scaled


def plain_embedding_forward(self: Any, input: Tensor) -> Tensor:
    """As `embedding_forward`, of an embedding without a scale."""
    return functional.embedding(input, self.weight.half()).float()


def tied_embedding_forward(self: Any, input_ids: Tensor) -> Tensor:
    """`stillgraph.patches.tied_embedding.forward` over an fp16 table."""
    scaled: Tensor = plain_tied_embedding_forward(self, input_ids) * self.embed_scale
    return scaled


def plain_tied_embedding_forward(self: Any, input: Tensor) -> Tensor:
    """`stillgraph.patches.tied_embedding.plain_forward` over an fp16 table."""
    flat = self.weight.half().t().index_select(1, input.reshape(-1)).float()  # [hidden, B * S]
    rows: Tensor = flat.t().reshape(*input.shape, self.weight.shape[1])
    return rows


REASON = "weights are stored in fp16; all else stays fp32, because Gemma's residual stream overflows fp16"
UPSTREAM = "https://github.com/huggingface/transformers/pull/29402"
REMOVE_WHEN = "weight-only precision is chosen by the exporter of torch"

HALF_LINEAR = Patch(
    name="half_linear",
    target="torch.nn:Linear.forward",
    signature=("self", "input"),
    replacement=linear_forward,
    reason=REASON,
    upstream=UPSTREAM,
    remove_when=REMOVE_WHEN,
)
_EMBEDDING = "transformers.models.gemma3.modeling_gemma3:Gemma3TextScaledWordEmbedding.forward"
HALF_EMBEDDING = Patch(
    name="half_embedding",
    target=_EMBEDDING,
    signature=("self", "input_ids"),
    replacement=embedding_forward,
    reason=REASON,
    upstream=UPSTREAM,
    remove_when=REMOVE_WHEN,
)
HALF_TIED_EMBEDDING = Patch(
    name="half_tied_embedding",
    target=_EMBEDDING,
    signature=("self", "input_ids"),
    replacement=tied_embedding_forward,
    reason=REASON,
    upstream=UPSTREAM,
    remove_when=REMOVE_WHEN,
)
PLAIN_HALF_EMBEDDING = replace(
    HALF_EMBEDDING,
    name="plain_half_embedding",
    target="torch.nn:Embedding.forward",
    signature=("self", "input"),
    replacement=plain_embedding_forward,
)
PLAIN_HALF_TIED_EMBEDDING = replace(
    PLAIN_HALF_EMBEDDING, name="plain_half_tied_embedding", replacement=plain_tied_embedding_forward
)
