"""Prefill and decode over one set of cache buffers.

Buffers are allocated once and bound once. Where a graph's outputs may not share its inputs' buffers there are
two sets of them, and a call of that graph reads one and writes the other.
Shapes: B rows, P prompt slots, C cache slots, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from runtime.manifest import GraphEntry
from runtime.session import Array, Runner, empty, return_memory
from runtime.spec import Port

Load = Callable[[GraphEntry], Runner]


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
    """One graph with its small inputs, its logits, and a call for each direction between the buffer sets."""

    def __init__(self, entry: GraphEntry, load: Load, buffers: Buffers) -> None:
        self.entry, self._load, self.buffers = entry, load, buffers
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

    def unload(self) -> None:
        self._calls.clear()

    def run(self) -> None:
        self._calls[self.buffers.current]()
        if not in_place(self.entry):
            self.buffers.flip()


class GraphPair:
    """The two graphs of a bundle and the cache they share.

    `cached[row]` are the ids whose keys and values the cache holds. one_at_a_time: at most one graph is in
    memory; the buffers outlive both. `load_seconds` is all the time spent loading and unloading graphs.
    """

    def __init__(
        self, prefill: GraphEntry, decode: GraphEntry, load: Load, one_at_a_time: bool = False
    ) -> None:
        self.ctx, self.rows, self.slots = decode.shape.capacity, decode.shape.batch, prefill.shape.slots
        self.continues = prefill.shape.ctx is not None
        self.one_at_a_time = one_at_a_time
        self.load_seconds = 0.0
        past = {alias.input for alias in decode.aliases}
        alone = in_place(decode) and (in_place(prefill) or not self.continues)
        shared = Buffers([port for port in decode.inputs if port.name in past], 1 if alone else 2)
        present = Buffers([port for port in prefill.outputs if port.name != "logits"], 1)
        self._decode = BoundGraph(decode, load, shared)
        self._prefill = BoundGraph(prefill, load, shared if self.continues else present)
        self.cached: list[list[int]] = [[] for _ in range(self.rows)]
        self._use(self._prefill)
        if not one_at_a_time:
            self._use(self._decode)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Put one prompt a row into the cache; logits [B, V] after each row's last token.

        The logits are valid until the next call.
        Starts after the longest prefix that the cache already holds, where this prefill can continue one.
        A row that is complete while others are not gives its last token again, into the same slot.
        """
        self._use(self._prefill)
        done = [self._reusable(row, prompt) for row, prompt in enumerate(prompts)]
        self.cached = [list(prompt[:count]) for prompt, count in zip(prompts, done, strict=True)]
        while any(len(cached) < len(prompt) for cached, prompt in zip(self.cached, prompts, strict=True)):
            self._chunk(prompts)
        if not self.continues:
            self._copy_to_decode()
        return self._prefill.logits[:, 0]

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append one token a row; logits [B, V] of the next one, valid until the next call.

        None leaves a row as it is: it gives its last token again, into the same slot.
        """
        self._use(self._decode)
        ids, past = self._decode.inputs["input_ids"], self._decode.inputs["past_length"]
        for row, token in enumerate(tokens):
            cached = self.cached[row]
            ids[row, 0] = cached[-1] if token is None else token
            past[row] = len(cached) - (token is None)
        self._decode.run()
        for cached, token in zip(self.cached, tokens, strict=True):
            if token is not None:
                cached.append(token)
        return self._decode.logits[:, 0]

    def reset(self) -> None:
        """Forget the cache; the next prompt starts from nothing."""
        self.cached = [[] for _ in range(self.rows)]

    def _chunk(self, prompts: Sequence[Sequence[int]]) -> None:
        inputs = self._prefill.inputs
        inputs["input_ids"][:] = 0
        pieces = []
        for row, prompt in enumerate(prompts):
            start = min(len(self.cached[row]), len(prompt) - 1)
            piece = list(prompt[start : start + self.slots])
            inputs["input_ids"][row, : len(piece)] = piece
            inputs["prompt_length"][row] = len(piece)
            if self.continues:
                inputs["past_length"][row] = start
            pieces.append((start, piece))
        self._prefill.run()
        for cached, (start, piece) in zip(self.cached, pieces, strict=True):
            cached[start:] = piece

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
        return count

    def _use(self, graph: BoundGraph) -> None:
        if graph.loaded:
            return
        began = time.perf_counter()
        if self.one_at_a_time:
            for other in (self._prefill, self._decode):
                other.unload()
            return_memory()
        graph.load()
        self.load_seconds += time.perf_counter() - began


def in_place(entry: GraphEntry) -> bool:
    """Whether every present may lie in its past's buffer."""
    return all(alias.same_buffer for alias in entry.aliases)
