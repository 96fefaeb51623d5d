"""RoPE of all kinds of layers in one order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stillgraph.patches.patch import Patch, forward_of

Tables = dict[str, tuple[Tensor, Tensor]]


def ordered_rotary(owner: Any) -> Patch:
    """Of a rotary embedding with frequencies for each kind of layer: the first call for positions makes the
    cos and sin [B, S, R] of every kind, in the order of `layer_types`, and later ones find them."""
    original, last = owner.forward, list[tuple[Tensor, Tables]]()

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        if not last or last[0][0] is not position_ids:
            tables = {kind: original(self, x, position_ids, kind) for kind in self.layer_types}
            last[:] = [(position_ids, tables)]
        return last[0][1][layer_type]

    return Patch(
        name=f"ordered_rotary of {owner.__name__}",
        target=forward_of(owner),
        signature=("self", "x", "position_ids", "layer_type"),
        replacement=forward,
        reason="the model asks for the kinds in the order of a set of strings, which is another in the next "
        "process: so were the nodes of a graph, their names, and the file's hash",
        upstream="https://github.com/huggingface/transformers/blob/main/src/transformers/models/gemma3/modeling_gemma3.py",
        remove_when="Gemma3TextModel.forward goes through `layer_types` in an order of its own",
    )
