"""A tied embedding read by column, so that the head needs no transposed copy of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from stillgraph.patches.patch import Patch


def forward(self: Any, input_ids: Tensor) -> Tensor:
    """`Gemma3TextScaledWordEmbedding.forward`, gathering columns of the transposed table [hidden, V]."""
    scaled: Tensor = plain_forward(self, input_ids) * self.embed_scale.to(self.weight.dtype)
    return scaled


def plain_forward(self: Any, input: Tensor) -> Tensor:
    """As `forward`, of an embedding without a scale."""
    flat = self.weight.t().index_select(1, input.reshape(-1))  # [hidden, B * S]
    rows: Tensor = flat.t().reshape(*input.shape, self.weight.shape[1])  # [B, S, hidden]
    return rows


TIED_EMBEDDING = Patch(
    name="tied_embedding",
    target="transformers.models.gemma3.modeling_gemma3:Gemma3TextScaledWordEmbedding.forward",
    signature=("self", "input_ids"),
    replacement=forward,
    reason="the head reads its whole matrix for every token and wants it as [hidden, V]; the embedding reads "
    "a few columns, so the one copy that both share is stored for the head",
    upstream="https://github.com/huggingface/transformers/tree/main/src/transformers/models/gemma3",
    remove_when="runtimes multiply by a transposed constant as fast as by a plain one, without a copy",
)
PLAIN_TIED_EMBEDDING = replace(
    TIED_EMBEDDING,
    name="plain_tied_embedding",
    target="torch.nn:Embedding.forward",
    signature=("self", "input"),
    replacement=plain_forward,
)
