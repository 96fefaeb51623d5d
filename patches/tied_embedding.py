"""A tied embedding read by column, so that the head needs no transposed copy of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of


def forward(self: Any, input: Tensor) -> Tensor:
    """`Embedding.forward`, gathering columns of the transposed table [hidden, V].

    Embeddings with a scale (`Gemma3TextScaledWordEmbedding`) call it and scale what it returns.
    """
    flat = self.weight.t().index_select(1, input.reshape(-1))  # [hidden, B * S]
    rows: Tensor = flat.t().reshape(*input.shape, self.weight.shape[1])  # [B, S, hidden]
    return rows


def tied_embedding(owner: type) -> Patch:
    """Of `torch.nn.Embedding`."""
    return Patch(
        name=f"tied_embedding of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "input"),
        replacement=forward,
        reason="the head reads its whole matrix for every token and wants it as [hidden, V]; the embedding "
        "reads a few columns, so the one copy that both share is stored for the head",
        upstream="https://github.com/huggingface/transformers/tree/main/src/transformers/models/gemma3",
        remove_when="runtimes multiply by a transposed constant as fast as by a plain one, without a copy",
    )
