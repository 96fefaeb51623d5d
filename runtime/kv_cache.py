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
from stillgraph.ports import Port, PortRole
from stillgraph.session import Array, Runner, empty, return_memory
from stillgraph.spec import LayerSpec
from stillgraph.vision.embedder import Embedder

Load = Callable[[GraphEntry], Runner]
Key = tuple[int | None, PortRole]  # layer, and key or value


class Graphs(Protocol):
    """What an engine drives: graphs of a bundle over their cache, as `GraphPair` describes it."""

    ctx: int
    rows: int
    max_len: int
    continues: bool
    load_seconds: float

    @property
    def cached(self) -> list[list[int]]: ...
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array: ...
    def decode(self, tokens: Sequence[int | None]) -> Array: ...
    def reset(self) -> None: ...
    def release(self) -> None: ...


class Buffers:
    """One or two sets of cache arrays by layer and role; `current` is the set that holds the cache.

    ports: of any graph; those of no layer are left out.
    """

    def __init__(self, ports: Sequence[Port], count: int) -> None:
        self.sets = [{key(port): empty(port) for port in ports if port.is_cache} for _ in range(count)]
        self.current = 0

    @property
    def held(self) -> dict[Key, Array]:
        return self.sets[self.current]

    def flip(self) -> None:
        """The set just written becomes the current one."""
        self.current = (self.current + 1) % len(self.sets)


class BoundGraph:
    """One graph with its small inputs, its logits, and a call for each direction between the buffer sets.

    `inputs` are those that are not of the cache, by role. pad: the id behind the end of a piece; embedder: of
    a graph that takes embeddings, what makes them of ids.
    """

    def __init__(
        self, entry: GraphEntry, load: Load, buffers: Buffers, pad: int, embedder: Embedder | None = None
    ) -> None:
        self.entry, self._load, self.buffers, self.embedder = entry, load, buffers, embedder
        self._pad = pad
        small = [port for port in entry.inputs if not port.is_cache]
        self.inputs = {port.role: empty(port) for port in small}
        self.logits = empty(entry.output("logits"))  # [B, 1, V]
        self._small = {port.name: self.inputs[port.role] for port in small}
        self._small[entry.output("logits").name] = self.logits
        self._calls: list[Callable[[], None]] = []

    @property
    def loaded(self) -> bool:
        return bool(self._calls)

    def load(self) -> None:
        runner, sets = self._load(self.entry), self.buffers.sets
        bound = []
        for index, read in enumerate(sets):
            written = read if in_place(self.entry) else sets[(index + 1) % len(sets)]
            past = {port.name: read[key(port)] for port in self.entry.inputs if port.is_cache}
            present = {port.name: written[key(port)] for port in self.entry.outputs if port.is_cache}
            bound.append(runner.bind({**past, **present, **self._small}))
        if self.embedder:
            self.embedder.load(self.inputs["embeddings"], self.inputs.get("picture_numbers"))
        self._calls = bound  # all or none: an interrupt may come before any line

    def unload(self) -> None:
        self._calls.clear()
        if self.embedder:
            self.embedder.unload()

    def give(self, pieces: Sequence[Sequence[int]]) -> None:
        """Take a piece of a prompt a row as the tokens of the next run."""
        if self.embedder:
            self.embedder.run(pieces)
            return
        ids = self.inputs["token_ids"]
        ids[:] = self._pad
        for row, piece in enumerate(pieces):
            ids[row, : len(piece)] = piece

    def run(self) -> None:
        self._calls[self.buffers.current]()
        if not in_place(self.entry):
            self.buffers.flip()


class GraphPair:
    """The two graphs of a bundle and the cache they share.

    `cached[row]` are the ids whose keys and values the cache holds. It is right or empty: a call takes it
    away before it writes a buffer and puts the new one there when all is written, so whatever ends a call in
    between, an interrupt among others, costs the cache and no more. one_at_a_time: at most one graph is in
    memory; the buffers outlive both. `load_seconds` is all the time spent loading and unloading graphs.
    embedder: for a prefill that takes embeddings. pad: the id that stands where there is no token.
    """

    def __init__(
        self,
        prefill: GraphEntry,
        decode: GraphEntry,
        layers: Sequence[LayerSpec],
        load: Load,
        one_at_a_time: bool = False,
        embedder: Embedder | None = None,
        pad: int = 0,
    ) -> None:
        self._layers, self._pad = layers, pad
        self.ctx, self.rows, self.max_len = decode.shape.limit, decode.shape.batch, prefill.shape.max_len
        self.continues = prefill.shape.ctx is not None
        self.one_at_a_time = one_at_a_time
        self.load_seconds = 0.0
        alone = in_place(decode) and (in_place(prefill) or not self.continues)
        shared, present = Buffers(decode.inputs, 1 if alone else 2), Buffers(prefill.outputs, 1)
        self._decode = BoundGraph(decode, load, shared, pad)
        self._prefill = BoundGraph(prefill, load, shared if self.continues else present, pad, embedder)
        whole = prefill.takes("picture_numbers")
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
        self.reset()
        fed = [list(prompt[:count]) for prompt, count in zip(prompts, done, strict=True)]
        for left in range(chunks, 0, -1):
            self._chunk(prompts, fed, left)
        if not self.continues:
            self._copy_to_decode(max(map(len, fed)))
        self.cached = fed
        return self._prefill.logits[:, 0]

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append one token a row; logits [B, V] of the next one, valid until the next call.

        None is for a row that has ended: it gives its last token again, into the same slot, or where that
        slot has moved, or holds a picture's feature, begins an empty cache.
        """
        self._use(self._decode)
        ids, past = self._decode.inputs["token_ids"], self._decode.inputs["past_length"]
        held = self.cached
        self.reset()
        for row, token in enumerate(tokens):
            cached = held[row]
            seen = bool(cached) and cached[-1] < 0
            if token is None and (seen or not self._can_return(len(cached), len(cached) - 1)):
                cached.clear()
            ids[row, 0] = token if token is not None else cached[-1] if cached else self._pad
            past[row] = len(cached) if token is not None else max(0, len(cached) - 1)
        self._decode.run()
        for cached, token in zip(held, tokens, strict=True):
            if token is not None:
                cached.append(token)
        self.cached = held
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

    def _chunk(self, prompts: Sequence[Sequence[int]], fed: list[list[int]], left: int) -> None:
        """Feed each row what it can take, leaving it something for each of the `left` - 1 chunks after.

        fed: of each row, what the buffers hold already; the pieces are added to it.
        """
        inputs, pieces = self._prefill.inputs, list[Sequence[int]]()
        for row, prompt in enumerate(prompts):
            start, todo = len(fed[row]), self._units(prompt[len(fed[row]) :])
            waits = len(todo) < left  # only from the first slot, which is then written again
            taken = min(fitting(todo, self.max_len), len(todo) - left + 1)
            piece = prompt[start : start + (1 if waits else sum(todo[:taken]))]
            pieces.append(piece)
            inputs["valid_length"][row] = len(piece)
            if self.continues:
                inputs["past_length"][row] = start
            if not waits:
                fed[row].extend(piece)
        self._prefill.give(pieces)
        self._prefill.run()

    def _units(self, input_ids: Sequence[int]) -> list[int]:
        return units(input_ids, self._together)

    def _copy_to_decode(self, filled: int) -> None:
        """The filled slots of a prefill with buffers of its own, into the buffers the decode reads next."""
        for each, written in self._prefill.buffers.held.items():
            self._decode.buffers.held[each][:, :, :filled] = written[:, :, :filled]

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


def key(port: Port) -> Key:
    """What a buffer is of: graphs that share a cache may have other names for it."""
    return port.layer, port.role


def in_place(entry: GraphEntry) -> bool:
    """Whether every present may lie in its past's buffer."""
    return all(alias.same_buffer for alias in entry.aliases)
