"""Drive an ONNX decoder of another exporter over keys and values that grow, or that share a buffer.

Shapes: S new tokens, T tokens before them, C slots, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort

from stillgraph.certificate import STAGE
from stillgraph.errors import StillgraphError, first_line
from stillgraph.exporter.ort import open_graph
from stillgraph.exporter.prove.foreign import ForeignGraph, fed
from stillgraph.exporter.validate.driver import POISON
from stillgraph.exporter.validate.dynamic_replay import Held
from stillgraph.spec import ModelSpec


class ForeignDecoder:
    """A `GrowingDecoder`. slots: of one buffer for past and present, which at first holds large values; None
    where keys and values grow. compares: whether keys and values are held for comparison."""

    def __init__(
        self, graph: ForeignGraph, spec: ModelSpec, optimized: bool, slots: int | None, compares: bool
    ) -> None:
        self.graph, self.spec, self.slots, self.compares = graph, spec, slots, compares
        self.session = open_foreign(graph, optimized)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        fill = 0.0 if self.slots is None else POISON
        self.length = 0
        self.cache: list[np.ndarray] = [
            np.full(cache.of(self.slots or 0), fill, cache.past.dtype) for cache in self.graph.caches
        ]

    def feed(self, ids: np.ndarray) -> np.ndarray:
        feeds = {port.name: fed(port, ids, self.length) for port in self.graph.inputs}
        try:
            logits = self._grow(feeds) if self.slots is None else self._share(feeds)
        except Exception as error:  # ONNX Runtime has no kind of its own for what a graph does not take
            problem = f"{self.graph.path} does not take {ids.shape[1]} tokens after {self.length}"
            problem += f" ({first_line(error)})"
            raise StillgraphError(STAGE, problem, "export it with lengths that are free") from error
        self.length += ids.shape[1]
        if logits.shape[-1] != self.spec.vocab_size:
            problem = f"{self.graph.path} gives {logits.shape[-1]} logits where the checkpoint has"
            problem += f" {self.spec.vocab_size} tokens"
            raise StillgraphError(STAGE, problem, "name the checkpoint that it was made from")
        last: np.ndarray = logits.reshape(-1, logits.shape[-1])[-1].astype(np.float32)
        return last

    def held(self) -> Iterator[Held]:
        if not (self.compares and self.graph.alike):
            return
        pairs = zip(self.spec.cached, self.cache[::2], self.cache[1::2], strict=True)
        for layer, *pair in pairs:
            keys, values = (block[0, :, : self.length].astype(np.float32) for block in pair)
            yield layer, self.length - keys.shape[1], keys, values  # a sliding cache holds the last ones

    def _grow(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        pasts = zip(self.graph.caches, self.cache, strict=True)
        given = feeds | {cache.past.name: block for cache, block in pasts}
        found = dict(zip(self.outputs, self.session.run(None, given), strict=True))
        self.cache = [found[cache.present] for cache in self.graph.caches]
        logits: np.ndarray = found["logits"]
        return logits

    def _share(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for cache, block in zip(self.graph.caches, self.cache, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(block)  # over the array's own memory
            binding.bind_ortvalue_input(cache.past.name, value)
            binding.bind_ortvalue_output(cache.present, value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits: np.ndarray = binding.get_outputs()[len(self.graph.caches)].numpy()
        return logits


def open_foreign(graph: ForeignGraph, optimized: bool) -> ort.InferenceSession:
    """Raises StillgraphError where ONNX Runtime does not load it: an unknown op, or another opset."""
    try:
        return open_graph(graph.path, optimized, pack=optimized and graph.rounds)
    except Exception as error:  # as above
        problem = f"{graph.path} cannot be driven: ONNX Runtime does not load it ({first_line(error)})"
        raise StillgraphError(STAGE, problem, "export it for ONNX Runtime's own ops") from error
