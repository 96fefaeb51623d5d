"""Call a bundle's graphs over a cache: prompts in chunks, then one token at a time.

Shapes: B rows, N tokens, S tokens of a call, C cache slots, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stillgraph.exporter.ort import open_graph, run
from stillgraph.exporter.validate import image
from stillgraph.manifest import GraphEntry, Manifest
from stillgraph.ports import PortRole

POISON = 1e4  # far over any key or value, and finite, as a slot left by a previous prompt would be
Cache = dict[tuple[int, PortRole], np.ndarray]  # buffers [B, KV, C, D] by layer and role, key or value


Feeds = dict[PortRole, np.ndarray]
Runnable = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]  # a graph, by names of its ports


class GraphRun:
    """A bundle's graphs, one of them in memory at a time.

    optimized: as a runtime would run them, ONNX Runtime's own optimizations on and quantized weights in the
    kernels that are made for them; else every op as it is written. features: of the picture in the text, as
    `stillgraph.exporter.validate.image` puts it there.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, optimized: bool, features: np.ndarray | None = None
    ) -> None:
        self.features = features
        self.bundle, self.manifest, self.optimized = bundle, manifest, optimized
        self.layers = manifest.model.cached
        cached = manifest.graph("decode") or manifest.graph("prefill")
        assert cached is not None
        self.cached = cached  # the graph whose buffers the cache is made of
        self.rows = np.arange(cached.shape.batch)
        self._open: tuple[str, Runnable] | None = None

    def new_cache(self) -> Cache:
        """Buffers that hold nothing: every slot is poisoned."""
        ports = self.cached.inputs if self.cached.shape.ctx else self.cached.outputs
        return {
            (port.layer, port.role): np.full(port.sizes, POISON, np.float32)
            for port in ports
            if port.layer is not None
        }

    def first_position(self, layer: int, length: int) -> int:
        """The position in a layer's first slot after `length` tokens."""
        return self.cached.shape.first_position(self.manifest.model.layers[layer], int(length))

    def prefill(self, cache: Cache, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Feed the first `lengths` [B] of ids [B, N] in chunks; logits [B, V] after the last of each row.

        All rows end with the last chunk; a row too short for that waits at slot 0.
        """
        graph, vision = self._graph("prefill"), self.manifest.model.vision
        max_len, done, longest = graph.shape.max_len, np.zeros_like(lengths), int(lengths.max())
        seen = None if self.features is None else vision
        first = min(longest, max_len) if seen is None else image.uncut(0, min(longest, max_len), seen)
        for left in range(1 - (first - longest) // max_len, 0, -1):
            waits = lengths - done < left
            count = np.where(waits, 1, np.minimum(max_len, lengths - done - left + 1))
            if seen is not None:
                count = np.array([image.uncut(*row, seen) for row in zip(done, count, strict=True)])
            chunk = np.full((len(self.rows), max_len), self.manifest.calling.tokens.pad, np.int64)
            for row in self.rows:
                chunk[row, : count[row]] = ids[row, done[row] : done[row] + count[row]]
            feeds = self._tokens(graph, chunk, done) | {"valid_length": count, "past_length": done}
            logits = self._call(graph, feeds, cache, lengths)
            done = np.where(waits, done, done + count)
        return logits

    def decode(self, cache: Cache, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Feed one token a row, ids [B], behind the `lengths` [B] that are there; logits [B, V]."""
        graph = self._graph("decode")
        return self._call(graph, {"token_ids": ids[:, None], "past_length": lengths}, cache, lengths)

    def _tokens(self, graph: GraphEntry, chunk: np.ndarray, past: np.ndarray) -> Feeds:
        """A prefill's ids [B, P] as it takes them, the first of each row at position `past` [B]."""
        if not graph.takes("embeddings"):
            return {"token_ids": chunk}
        embed = self.manifest.graph("embed")
        assert embed is not None
        (embeddings,) = self.load(embed)({embed.input("token_ids").name: chunk}).values()
        pictures = np.zeros_like(chunk)
        if self.features is not None:
            for row in self.rows:
                pictures[row] = image.fill(embeddings[row], int(past[row]), self.features)
        return {"embeddings": embeddings, "picture_numbers": pictures}

    def _graph(self, role: str) -> GraphEntry:
        graph = self.manifest.graph(role)
        assert graph is not None
        if self._open is None or self._open[0] != role:
            self._open = None  # before the next is loaded
            self._open = role, self.load(graph)
        return graph

    def load(self, graph: GraphEntry) -> Runnable:
        """What runs a graph."""
        pack = self.optimized and self.manifest.quantization is not None
        session = open_graph(self.bundle / graph.file.path, self.optimized, pack)
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, run(session, feeds, graph.aliases), strict=True))

    def _call(self, graph: GraphEntry, given: Feeds, cache: Cache, lengths: np.ndarray) -> np.ndarray:
        """Run a graph and put what it returns where its valid tokens are into the cache.

        given: by role; what the graph does not take is left out.
        """
        assert self._open is not None
        feeds = {
            port.name: given[port.role] if port.layer is None else cache[port.layer, port.role]
            for port in graph.inputs
        }
        found = self._open[1](feeds)
        for port in graph.outputs:
            if port.layer is None:
                continue
            block, key = found[port.name], (port.layer, port.role)
            if block.shape == cache[key].shape:
                cache[key] = block
            else:
                fill(cache[key], block, lengths)  # a prefill without a cache: to the front
        result: np.ndarray = found[graph.output("logits").name][:, 0]
        return result


def fill(buffer: np.ndarray, block: np.ndarray, lengths: np.ndarray) -> None:
    """Copy each row's first `lengths` [B] slots of `block` [B, KV, S, D] into `buffer` [B, KV, C, D]."""
    for row, length in enumerate(lengths):
        buffer[row, :, :length] = block[row, :, :length]
