"""The runtime finds ports by their roles: under other names, and in another order, the same tokens come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from stillgraph.engine import Engine
from stillgraph.kv_cache import GraphPair
from stillgraph.manifest import Alias, GraphEntry
from stillgraph.spec import GraphShape
from tests.mock_model import Mock, MockRunner, entry, greedy_tokens, manifest, spec

V = 11


def renamed(graph: GraphEntry) -> GraphEntry:
    """The same graph with names that say nothing, its ports in the reverse order."""
    names = {port.name: f"in_{index}" for index, port in enumerate(graph.inputs)}
    names |= {port.name: f"out_{index}" for index, port in enumerate(graph.outputs)}
    sides = (
        tuple(port.model_copy(update={"name": names[port.name]}) for port in reversed(side))
        for side in (graph.inputs, graph.outputs)
    )
    aliases = tuple(
        Alias(output=names[alias.output], input=names[alias.input], same_buffer=alias.same_buffer)
        for alias in graph.aliases
    )
    inputs, outputs = sides
    return graph.model_copy(update={"inputs": inputs, "outputs": outputs, "aliases": aliases})


class Renamed:
    """A mock graph under names of its own."""

    def __init__(self, mock: Mock, plain: GraphEntry, named: GraphEntry) -> None:
        self.runner = MockRunner(mock, plain)
        pairs = zip((*plain.inputs, *plain.outputs), (*named.inputs[::-1], *named.outputs[::-1]), strict=True)
        self.names = {ours.name: theirs.name for ours, theirs in pairs}

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        assert set(arrays) >= set(self.names.values())
        return self.runner.bind({ours: arrays[theirs] for ours, theirs in self.names.items()})


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("continues", [False, True])
def test_names_and_order_do_not_matter(continues: bool, in_place: bool) -> None:
    mock = Mock(V)
    plain = [
        entry(GraphShape(role="prefill", max_len=4, ctx=16 if continues else None), V, in_place),
        entry(GraphShape(role="decode", max_len=1, ctx=16), V, in_place),
    ]
    named = {graph.shape.role: renamed(graph) for graph in plain}

    def load(graph: GraphEntry) -> Renamed:
        mock.alive.append(graph.shape.role)
        return Renamed(mock, next(p for p in plain if p.shape == graph.shape), graph)

    pair = GraphPair(named["prefill"], named["decode"], spec(V).layers, load)
    engine = Engine(manifest({}, V), pair, None, Path())
    for ids in ([3, 1, 4], [3, 1, 4, 1, 5, 9, 2] if continues else [3, 1]):
        found = [step.token for step in engine.stream(ids, max_new_tokens=5)]
        assert found == greedy_tokens(ids, 5, V)


def test_the_pad_token_of_the_manifest_fills_a_chunk() -> None:
    seen: list[list[int]] = []

    class Watching(MockRunner):
        def run(self, arrays: Mapping[str, np.ndarray]) -> None:
            seen.append(arrays["input_ids"][0].tolist())
            super().run(arrays)

    mock = Mock(V)

    def load(graph: GraphEntry) -> Watching:
        mock.alive.append(graph.shape.role)
        return Watching(mock, graph)

    graphs = [
        entry(shape, V)
        for shape in (
            GraphShape(role="prefill", max_len=4, ctx=16),
            GraphShape(role="decode", max_len=1, ctx=16),
        )
    ]
    pair = GraphPair(*graphs, spec(V).layers, load, pad=7)
    pair.prefill([[3, 1, 4, 1, 5]])
    assert seen == [[3, 1, 4, 1], [5, 7, 7, 7]]
