"""The kinds of a rotary embedding come in one order, whatever the hashes of their names are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3 as gemma3

from stillgraph.patches.ordered_rotary import ordered_rotary
from stillgraph.patches.patch import applied

KINDS = ("sliding_attention", "full_attention")
# Traces a decode graph; its first line is the order of a set of both kinds.
TRACE = """
import sys
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.trace.tracing import convert
from stillgraph.spec import GraphShape

print(*{"full_attention", "sliding_attention"})
shape = GraphShape(role="decode", max_len=1, ctx=40)
model = convert(open_checkpoint(sys.argv[1]), shape, "portable", "fp32")
print([(node.name, node.op_type, [value and value.name for value in node.inputs]) for node in model.graph])
"""


def test_every_call_gets_what_it_asks_for() -> None:
    config = gemma3.Gemma3TextConfig(head_dim=16, num_hidden_layers=6)
    rotary = gemma3.Gemma3RotaryEmbedding(config)
    x, calls = torch.zeros(1), [(torch.arange(n)[None], kind) for n in (5, 9) for kind in KINDS]
    plain = [rotary(x, *call) for call in calls]
    with applied((ordered_rotary(gemma3.Gemma3RotaryEmbedding),)):
        for call, expected in zip(calls, plain, strict=True):
            for found, table in zip(rotary(x, *call), expected, strict=True):
                assert torch.equal(found, table)


def test_a_graph_is_the_same_in_the_next_process(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seed in (0, 1):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        command = [sys.executable, "-c", TRACE, str(tiny_checkpoint())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(done.stdout.splitlines())
    (order, graph), (other_order, other_graph) = found
    assert order != other_order, "choose seeds of which one has the other order"
    assert graph == other_graph
