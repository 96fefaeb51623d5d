"""One graph whose keys and values grow with the text: the baseline that static graphs are measured against.

A call's presents are the pasts of the next, as the values that the session made: nothing is copied between
calls. Inside the graph each step still copies every key and value into a longer buffer, which is the price of
a growing cache.
Shapes: S new tokens, T tokens before the call, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from stillgraph.manifest import GraphEntry
from stillgraph.ports import PAST
from stillgraph.session import Array


class Caller(Protocol):
    """A loaded graph that chooses its outputs' memory: `stillgraph.session.Session`."""

    def call(self, feeds: Mapping[str, ort.OrtValue]) -> list[ort.OrtValue]: ...


@dataclass(frozen=True)
class Held:
    """Tokens, and their keys and values by input: replaced as one, so that no interrupt comes between."""

    ids: list[int]
    past: dict[str, ort.OrtValue]


class GrowingGraph:
    """A dynamic graph and the keys and values so far; an engine drives it as it does a `GraphPair`.

    `cached[0]` are the ids whose keys and values are held: there is one row. max_len: tokens that one call
    may take, which is all of ctx. There is no prefill to unload, so `one_at_a_time` has no meaning here.
    """

    rows, continues = 1, True

    def __init__(self, entry: GraphEntry, load: Callable[[GraphEntry], Caller]) -> None:
        self.ctx, self.max_len = entry.shape.limit, entry.shape.max_len
        self.load_seconds = 0.0
        self._past_of = {alias.output: alias.input for alias in entry.aliases}
        self._outputs = [port.name for port in entry.outputs]
        self._ids, self._logits = entry.input("token_ids").name, entry.output("logits").name
        self._caches = [port for port in entry.inputs if port.is_cache]
        self._graph = load(entry)
        self._held = Held([], self._nothing())

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Put the one prompt into the cache, in one call; logits [1, V] after its last token.

        Starts after the longest prefix that the cache holds: what is held behind that is cut off.
        """
        (prompt,) = prompts
        length = common(self._held.ids, prompt)
        self._cut(length)
        return self._feed(prompt[length:])

    def decode(self, tokens: Sequence[int | None]) -> Array:
        """Append the one row's token; logits [1, V] of the next one."""
        return self._feed([token for token in tokens if token is not None])

    @property
    def cached(self) -> list[list[int]]:
        return [self._held.ids]

    def reset(self) -> None:
        """Forget the cache, and free it; the next prompt starts from nothing."""
        self._held = Held([], self._nothing())

    def release(self) -> None:
        """Does nothing: there is no other graph."""

    def _feed(self, ids: Sequence[int]) -> Array:
        new = ort.OrtValue.ortvalue_from_numpy(np.array([ids], np.int64))  # [1, S]
        held = self._held
        outputs = dict(zip(self._outputs, self._graph.call({self._ids: new, **held.past}), strict=True))
        logits: Array = outputs.pop(self._logits).numpy()  # [1, 1, V]
        past = {self._past_of[name]: value for name, value in outputs.items()}
        self._held = Held([*held.ids, *ids], past)
        return logits[:, 0]

    def _cut(self, length: int) -> None:
        """Keep the keys and values of the first `length` tokens."""
        if length == 0:
            self.reset()
        elif length < len(self._held.ids):
            past = {name: _first(value, length) for name, value in self._held.past.items()}
            self._held = Held(self._held.ids[:length], past)

    def _nothing(self) -> dict[str, ort.OrtValue]:
        """Keys and values [1, KV, 0, D] of no token."""
        return {
            port.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(port.at({PAST: 0}), port.dtype))
            for port in self._caches
        }


def common(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of the prompt that need no computing: the prefix that is cached, but the last token."""
    count = 0
    while count < min(len(cached), len(prompt) - 1) and cached[count] == prompt[count]:
        count += 1
    return count


def _first(value: ort.OrtValue, length: int) -> ort.OrtValue:
    held: Array = value.numpy()[:, :, :length]  # [1, KV, length, D]
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(held))
