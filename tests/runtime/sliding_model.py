"""A numpy model of graphs whose sliding layers move their window on, and an engine over it.

Each layer's output of a token is sum((slot + 1) * input) mod V over the slots that it sees, and is the next
layer's input; the last layer's output is the next token. So one wrong key anywhere is a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillgraph.calling import Calling, Tokens
from stillgraph.engine import Engine
from stillgraph.kv_cache import GraphPair
from stillgraph.manifest import Alias, File, GraphEntry, Manifest
from stillgraph.ports import input_ports, output_ports, past_names, present_names
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec

V = 101


def layers_of(*windows: int | None) -> tuple[LayerSpec, ...]:
    return tuple(layer_of(window) for window in windows)


def layer_of(
    window: int | None, kv_heads: int = 1, head_dim: int = 1, kv_from: int | None = None
) -> LayerSpec:
    kind = "full_attention" if window is None else "sliding_attention"
    return LayerSpec(kind=kind, window=window, kv_heads=kv_heads, head_dim=head_dim, kv_from=kv_from)


def mixed(inputs: np.ndarray, first: int, position: int, window: int | None) -> int:
    """A layer's output at `position`, of inputs whose first is at position `first`."""
    start = 0 if window is None else max(0, position - window + 1)
    seen = inputs[start - first : position - first + 1]
    assert start >= first, "a key is needed that has left"
    return int(seen @ np.arange(start + 1, position + 2)) % V


def greedy(
    ids: Sequence[int], count: int, windows: Sequence[int | None], kv_from: Mapping[int, int] | None = None
) -> list[int]:
    """The next `count` tokens, from growing lists: the truth. kv_from: layers that read another's list, and
    add their own input to what they make of it."""
    known: list[list[int]] = [[] for _ in windows]
    shared = kv_from or {}
    tokens, ids = [], list(ids)
    for position in range(len(ids) + count - 1):
        value = ids[position] if position < len(ids) else tokens[-1]
        for index, window in enumerate(windows):
            inputs, own = known[shared.get(index, index)], value if index in shared else 0
            if index not in shared:
                inputs.append(value)
            start = 0 if window is None else max(0, position - window + 1)
            value = (mixed(np.array(inputs[start:]), start, position, window) + own) % V
        if position >= len(ids) - 1:
            tokens.append(value)
    return tokens


def first_held(capacity: int, window: int | None, length: int) -> int:
    """The op's rule, a token at a time: a full buffer keeps its last window - 1 tokens, at its front."""
    held = 0
    for _ in range(length):
        held = (held if held < capacity or window is None else window - 1) + 1
    return length - held


class Op:
    """A graph in numpy: `sliding_window_cache`, in place, junk behind the last valid token of a chunk."""

    def __init__(self, shape: GraphShape, layers: Sequence[LayerSpec], calls: list[Any]) -> None:
        self.shape, self.layers, self.calls = shape, layers, calls

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        for index, layer in enumerate(self.layers):
            for past, present in zip(past_names(index), present_names(index), strict=True):
                assert (past in arrays) == (present in arrays) == (layer.kv_from is None)
                if past in arrays:
                    assert arrays[past] is arrays[present], "the op works in place"
        return lambda: self.run(arrays)

    def run(self, arrays: Mapping[str, np.ndarray]) -> None:
        ones = np.ones(self.shape.batch, np.int64)
        past, new = arrays["past_length"], arrays.get("prompt_length", ones)
        self.calls.append((self.shape.role, past.tolist(), new.tolist()))
        for row in range(self.shape.batch):
            assert new[row] >= 1
            target = self.row(arrays, row, int(past[row]), int(new[row]))
            arrays["logits"][row, 0] = -np.abs(np.arange(V) - target)

    def row(self, arrays: Mapping[str, np.ndarray], row: int, past: int, new: int) -> int:
        values = arrays["input_ids"][row, :new].astype(np.int64)
        of_layer: dict[int, tuple[np.ndarray, int]] = {}  # inputs, and the position of the first
        for index, layer in enumerate(self.layers):
            if layer.kv_from is None:
                of_layer[index] = self.written(arrays, row, index, values, past)
            inputs, first = of_layer[index if layer.kv_from is None else layer.kv_from]
            own = np.zeros_like(values) if layer.kv_from is None else values
            seen = [mixed(inputs, first, past + i, layer.window) for i in range(new)]
            values = (np.array(seen) + own) % V
        return int(values[-1])

    def written(
        self, arrays: Mapping[str, np.ndarray], row: int, index: int, values: np.ndarray, past: int
    ) -> tuple[np.ndarray, int]:
        """Put a layer's new inputs behind those of its buffers, and every head and column of these."""
        layer, new = self.layers[index], len(values)
        key, value = (arrays[name][row] for name in past_names(index))  # [KV, C, D]
        assert key.shape == value.shape == (layer.kv_heads, self.shape.capacity(layer), layer.head_dim)
        head = np.arange(1, layer.kv_heads + 1)[:, None, None]
        column = np.arange(layer.head_dim)[None, None]
        capacity, evicts = key.shape[1], self.shape.evicts(layer)
        assert evicts or past + self.shape.max_len <= capacity, "the padded chunk does not fit"
        window = layer.window if evicts else None
        first, next_first = (first_held(capacity, window, length) for length in (past, past + new))
        held = (value - key)[-1, : past - first, -1] / layer.kv_heads
        known = [int(number) for number in held]  # NaN that is read is no integer
        inputs = np.array([*known, *values], np.int64)
        kept = inputs[next_first - first :]
        key[:], value[:] = np.nan, np.nan
        key[:, : len(kept)] = kept[None, :, None] * head + column
        value[:, : len(kept)] = 2 * kept[None, :, None] * head + column
        return inputs, first


def engine_of(
    windows: Sequence[int | None] = (5, None, 8),
    slack: int = 3,
    max_len: int = 4,
    ctx: int = 150,
    batch: int = 1,
    one_at_a_time: bool = False,
    stop: Sequence[int] = (),
    layers: tuple[LayerSpec, ...] | None = None,
) -> tuple[Engine, list[Any]]:
    """An engine over the model, and the calls of its graphs: (role, past lengths, new lengths).

    layers: in place of those of `windows`.
    """
    layers, calls = layers or layers_of(*windows), []
    spec = ModelSpec(
        architecture="Mock", vocab_size=V, hidden_size=1, num_attention_heads=1,
        max_position_embeddings=ctx, layers=layers,
    )  # fmt: skip
    entries = [
        entry(spec, GraphShape(role="prefill", batch=batch, max_len=max_len, ctx=ctx, slack=slack)),
        entry(spec, GraphShape(role="decode", batch=batch, max_len=1, ctx=ctx, slack=slack)),
    ]
    pair = GraphPair(*entries, layers, lambda graph: Op(graph.shape, layers, calls), one_at_a_time)
    calling = Calling(tokens=Tokens(bos=None, stop=tuple(stop)), prompt=None)
    return Engine(Manifest.model_construct(model=spec, calling=calling), pair, None, Path()), calls


def entry(spec: ModelSpec, shape: GraphShape) -> GraphEntry:
    return GraphEntry(
        shape=shape,
        file=File(path=f"{shape.name}.onnx", nbytes=0, sha256="0" * 64),
        inputs=input_ports(spec, shape),
        outputs=output_ports(spec, shape),
        aliases=tuple(
            Alias(output=present, input=past, same_buffer=True)
            for layer in spec.cached
            for present, past in zip(present_names(layer), past_names(layer), strict=True)
        ),
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, length).tolist()


def batch_tokens(engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, step in engine.stream_batch(prompts, max_new_tokens=count):
        rows[row].append(step.token)
    return rows
