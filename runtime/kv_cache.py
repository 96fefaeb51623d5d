"""Prefill and decode over one set of cache buffers.

Buffers are allocated once and bound once. Where a graph's outputs may not share its inputs' buffers there are
two sets of them, and a call of that graph reads one and writes the other.
Shapes: B rows, P prompt tokens, C cache slots, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from stillgraph.chunking import calls, fitting, units
from stillgraph.manifest import GraphEntry
from stillgraph.session import Array, Runner, empty, return_memory
from stillgraph.spec import LayerSpec, Port
from stillgraph.vision.embedder import Embedder

Load = Callable[[GraphEntry], Runner]


class Graphs(Protocol):
    """What an engine drives: graphs of a bundle over their cache, as `GraphPair` describes it."""

    ctx: int
    rows: int
    max_len: int
    continues: bool
    load_seconds: float
    cached: list[list[int]]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array: ...
    def decode(self, tokens: Sequence[int | None]) -> Array: ...
    def reset(self) -> None: ...
    def release(self) -> None: ...


class Buffers:
    """One or two sets of cache arrays by name; `current` is the set that holds the cache."""

    def __init__(self, ports: list[Port], count: int) -> None:
        self.sets = [{port.name: empty(port) for port in ports} for _ in range(count)]
        self.current = 0

    def __getitem__(self, name: str) -> Array:
        return self.sets[self.current][name]

    def flip(self) -> None:
        """The set just written becomes the current one."""
        self.current = (self.current + 1) % len(self.sets)


class BoundGraph:
    """One graph with its small inputs, its logits, and a call for each direction between the buffer sets.

    embedder: of a graph that takes embeddings, what makes them of ids.
    """

    def __init__(
        self, entry: GraphEntry, load: Load, buffers: Buffers, embedder: Embedder | None = None
    ) -> None:
        self.entry, self._load, self.buffers, self.embedder = entry, load, buffers, embedder
        self.past_of = {alias.output: alias.input for alias in entry.aliases}
        past = set(self.past_of.values())
        self.inputs = {port.name: empty(port) for port in entry.inputs if port.name not in past}
        self.logits = next(empty(port) for port in entry.outputs if port.name == "logits")  # [B, 1, V]
        self._calls: list[Callable[[], None]] = []

    @property
    def loaded(self) -> bool:
        return bool(self._calls)

    def load(self) -> None:
        runner, sets = self._load(self.entry), self.buffers.sets
        present = [port.name for port in self.entry.outputs if port.name != "logits"]
        for index, past in enumerate(sets):
            written = past if in_place(self.entry) else sets[(index + 1) % len(sets)]
            outputs = {name: written[self.past_of.get(name, name)] for name in present}
            self._calls.append(runner.bind({**past, **outputs, **self.inputs, "logits": self.logits}))
        if self.embedder:
            self.embedder.load(self.inputs["inputs_embeds"], self.inputs.get("token_type_ids"))

    def unload(self) -> None:
        self._calls.clear()
        if self.embedder:
            self.embedder.unload()

    def give(self, pieces: Sequence[Sequence[int]]) -> None:
        """Take a piece of a prompt a row as the tokens of the next run."""
        if self.embedder:
            self.embedder.run(pieces)
            return
        ids = self.inputs["input_ids"]
        ids[:] = 0
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)] = piece

    def run(self) -> None:
        self._calls[self.buffers.current]()
        if not in_place(self.entry):
            self.buffers.flip()


class GraphPair:
    """The two graphs of a bundle and the cache they share.

    `cached[row]` are the ids whose keys and values the cache holds. one_at_a_time: at most one graph is in
    memory; the buffers outlive both. `load_seconds` is all the time spent loading and unloading graphs.
    embedder: for a prefill that takes embeddings.
    """

    def __init__(
        self,
        prefill: GraphEntry,
        decode: GraphEntry,
        layers: Sequence[LayerSpec],
        load: Load,
        one_at_a_time: bool = False,
        embedder: Embedder | None = None,
    ) -> None:
        self._layers = layers
        self.ctx, self.rows, self.max_len = decode.shape.limit, decode.shape.batch, prefill.shape.max_len
        self.continues = prefill.shape.ctx is not None
        self.one_at_a_time = one_at_a_time
        self.load_seconds = 0.0
        past = {alias.input for alias in decode.aliases}
        alone = in_place(decode) and (in_place(prefill) or not self.continues)
        shared = Buffers([port for port in decode.inputs if port.name in past], 1 if alone else 2)
        present = Buffers([port for port in prefill.outputs if port.name != "logits"], 1)
        self._decode = BoundGraph(decode, load, shared)
        self._prefill = BoundGraph(prefill, load, shared if self.continues else present, embedder)
        whole = embedder is not None and "token_type_ids" in self._prefill.inputs
        self._together = embedder.image_tokens if embedder and whole else 1  # tokens that one call must take
        self.cached: list[list[int]] = [[] for _ in range(self.rows)]
        if one_at_a_time:
            if embedder is None:  # else a picture may come first
                self._use(self._prefill)
        else:
            with ThreadPoolExecutor(2) as pool:  # loading a graph keeps one core busy
                list(pool.map(BoundGraph.load, (self._prefill, self._decode)))

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Put one prompt a row into the cache; logits [B, V] after each row's last token.

        The logits are valid until the next call.
        Starts after the longest prefix that the cache already holds, where this prefill can continue one.
        All rows end in the last chunk, so that none is fed again after its end: a layer that moved its window
        on could not take it.
        """
        self._use(self._prefill)
        done, chunks = self._start(prompts)
        self.cached = [list(prompt[:count]) for prompt, count in zip(prompts, done, strict=True)]
        for left in range(chunks, 0, -1):
            self._chunk(prompts, left)
        if not self.continues:
            self._copy_to_decode()
        return self._prefill.logits[:, 0]

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append one token a row; logits [B, V] of the next one, valid until the next call.

        None is for a row that has ended: it gives its last token again, into the same slot, or where that
        slot has moved, or holds a picture's feature, begins an empty cache.
        """
        self._use(self._decode)
        ids, past = self._decode.inputs["input_ids"], self._decode.inputs["past_length"]
        for row, token in enumerate(tokens):
            cached = self.cached[row]
            seen = bool(cached) and cached[-1] < 0
            if token is None and (seen or not self._can_return(len(cached), len(cached) - 1)):
                cached.clear()
            ids[row, 0] = token if token is not None else cached[-1] if cached else 0
            past[row] = len(cached) if token is not None else max(0, len(cached) - 1)
        self._decode.run()
        for cached, token in zip(self.cached, tokens, strict=True):
            if token is not None:
                cached.append(token)
        return self._decode.logits[:, 0]

    def reset(self) -> None:
        """Forget the cache; the next prompt starts from nothing."""
        self.cached = [[] for _ in range(self.rows)]

    def release(self) -> None:
        """Let other graphs have the memory, where one at a time may have it."""
        if self.one_at_a_time:
            for graph in (self._prefill, self._decode):
                graph.unload()
            return_memory()

    def _start(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """How many tokens of each prompt are kept from the cache, and how many chunks the others take."""
        done = [self._reusable(row, prompt) for row, prompt in enumerate(prompts)]
        while True:
            todo = [self._units(prompt[count:]) for prompt, count in zip(prompts, done, strict=True)]
            chunks = max(calls(lengths, self.max_len) for lengths in todo)
            # Each call feeds each row: one with too little left for that can only wait at its first slot.
            short = [row for row, lengths in enumerate(todo) if len(lengths) < chunks and done[row]]
            if not short:
                return done, chunks
            for row in short:
                done[row] = 0

    def _chunk(self, prompts: Sequence[Sequence[int]], left: int) -> None:
        """Feed each row what it can take, leaving it something for each of the `left` - 1 chunks after."""
        inputs, pieces = self._prefill.inputs, list[Sequence[int]]()
        for row, prompt in enumerate(prompts):
            cached = self.cached[row]
            start, todo = len(cached), self._units(prompt[len(cached) :])
            waits = len(todo) < left  # only from the first slot, which is then written again
            taken = min(fitting(todo, self.max_len), len(todo) - left + 1)
            piece = prompt[start : start + (1 if waits else sum(todo[:taken]))]
            pieces.append(piece)
            inputs["prompt_length"][row] = len(piece)
            if self.continues:
                inputs["past_length"][row] = start
            if not waits:
                cached.extend(piece)
        self._prefill.give(pieces)
        self._prefill.run()

    def _units(self, input_ids: Sequence[int]) -> list[int]:
        return units(input_ids, self._together)

    def _copy_to_decode(self) -> None:
        """The filled slots of a prefill with buffers of its own, into the buffers the decode reads next."""
        filled = max(map(len, self.cached))
        for alias in self._decode.entry.aliases:
            written = self._prefill.buffers[alias.output]
            self._decode.buffers[alias.input][:, :, :filled] = written[:, :, :filled]

    def _reusable(self, row: int, prompt: Sequence[int]) -> int:
        """Tokens of `prompt` that need no computing: the prefix held in the cache, but the last token."""
        if not self.continues:
            return 0
        cached, count = self.cached[row], 0
        while count < min(len(cached), len(prompt) - 1) and cached[count] == prompt[count]:
            count += 1
        return count if self._can_return(len(cached), count) else 0

    def _can_return(self, length: int, to: int) -> bool:
        """Whether a cache of `length` tokens is one of its first `to` tokens if the others are not read."""
        first = self._decode.entry.shape.first_position
        return all(first(layer, length) == first(layer, to) for layer in self._layers)

    def _use(self, graph: BoundGraph) -> None:
        if graph.loaded:
            return
        began = time.perf_counter()
        self.release()
        graph.load()
        self.load_seconds += time.perf_counter() - began


def in_place(entry: GraphEntry) -> bool:
    """Whether every present may lie in its past's buffer."""
    return all(alias.same_buffer for alias in entry.aliases)
