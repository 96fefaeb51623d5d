"""The kinds of a rotary embedding come in one order, whatever the hashes of their names are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3 as gemma3

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.trace.tracing import convert
from stillgraph.patches.ordered_rotary import ordered_rotary
from stillgraph.patches.patch import applied
from stillgraph.spec import GraphShape

KINDS = ("sliding_attention", "full_attention")
Nodes = list[tuple[str | None, list[str | None]]]


def test_every_call_gets_what_it_asks_for() -> None:
    config = gemma3.Gemma3TextConfig(head_dim=16, num_hidden_layers=6)
    rotary = gemma3.Gemma3RotaryEmbedding(config)
    x, calls = torch.zeros(1), [(torch.arange(n)[None], kind) for n in (5, 9) for kind in KINDS]
    plain = [rotary(x, *call) for call in calls]
    with applied((ordered_rotary(gemma3.Gemma3RotaryEmbedding),)):
        for call, expected in zip(calls, plain, strict=True):
            for found, table in zip(rotary(x, *call), expected, strict=True):
                assert torch.equal(found, table)


def test_a_graph_is_the_same_in_either_order(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name `set` in the model's module stands before Python's, whose order is another in each process."""
    found = list[Nodes]()
    for backwards in (False, True):
        monkeypatch.setattr(
            gemma3, "set", lambda kinds, b=backwards: sorted(set(kinds), reverse=b), raising=False
        )
        shape = GraphShape(role="decode", max_len=1, ctx=40)
        model = convert(open_checkpoint(str(tiny_checkpoint())), shape, "portable", "fp32")
        found.append([(node.name, [value and value.name for value in node.inputs]) for node in model.graph])
    assert found[0] == found[1]
