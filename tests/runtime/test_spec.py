"""The slots of a cache: what each layer holds and where, against the op that moves its window on by itself.

Shapes: B rows, S tokens, C cache slots, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stillgraph.spec import GraphShape, LayerSpec

HEADS: dict[str, Any] = {"kv_heads": 1, "head_dim": 8}
FULL = LayerSpec(kind="full_attention", **HEADS)
B, D, CTX = 2, 8, 150
JUNK = 1e6  # in padding and in slots that hold nothing; a mean over one of them is far off
WINDOWS = (1, 2, 5, 8, 48)
SLACKS = {1: (0, 1, 6, 128), 4: (3, 4, 9, 60), 16: (15, 40), 33: (32, 100)}  # by max_len


def sliding(window: int) -> LayerSpec:
    return LayerSpec(kind="sliding_attention", window=window, **HEADS)


@cache
def operator(shape: GraphShape, layer: LayerSpec) -> ort.InferenceSession:
    """GroupQueryAttention over one head as an export calls it, but without RoPE: keys stay as they are."""
    from onnx import TensorProto, helper

    float32, int32 = TensorProto.FLOAT, TensorProto.INT32
    new, past = [B, shape.max_len, D], [B, 1, shape.capacity(layer), D]
    inputs: list[tuple[str, int, list[int]]] = [("query", float32, new), ("key", float32, new)]
    inputs += [("value", float32, new), ("past_key", float32, past), ("past_value", float32, past)]
    inputs += [("seqlens_k", int32, [B]), ("total", int32, []), ("query_seqlens", int32, [B])]
    outputs = [("output", float32, new), ("present_key", float32, past), ("present_value", float32, past)]
    node = helper.make_node(
        "GroupQueryAttention",
        [*(name for name, _, _ in inputs[:-1]), *[""] * 9, "query_seqlens"],
        [name for name, _, _ in outputs],
        domain="com.microsoft",
        num_heads=1,
        kv_num_heads=1,
        scale=1.0,
        do_rotary=0,
        local_window_size=layer.window or -1,
        sliding_window_cache=int(shape.evicts(layer)),
    )
    values = [[helper.make_tensor_value_info(*value) for value in side] for side in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "op", *values), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options)


class Rows:
    """Buffers of the op; the key of position n is n + 1 and its value 2 (n + 1), so that each slot tells."""

    def __init__(self, shape: GraphShape, layer: LayerSpec) -> None:
        self.shape, self.layer = shape, layer
        self.lengths = np.zeros(B, np.int64)
        slots = (B, 1, shape.capacity(layer), D)
        self.past = {name: np.full(slots, JUNK, np.float32) for name in ("past_key", "past_value")}

    def feed(self, shape: GraphShape, new: np.ndarray) -> None:
        """One call with `new` [B] valid tokens in `shape.max_len`."""
        positions = self.lengths[:, None] + np.arange(1, shape.max_len + 1)
        keys = np.where(np.arange(shape.max_len) < new[:, None], positions, JUNK).astype(np.float32)
        keys = np.repeat(keys[..., None], D, axis=2)
        total = np.array(shape.limit + (shape.slack or 0), np.int32)
        feeds = {"query": np.zeros_like(keys), "key": keys, "value": 2 * keys, **self.past, "total": total}
        feeds |= {
            "seqlens_k": (self.lengths + new - 1).astype(np.int32),
            "query_seqlens": new.astype(np.int32),
        }
        self.output = np.empty_like(keys)
        session = operator(shape, self.layer)
        binding = session.io_binding()
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        written = ort.OrtValue.ortvalue_from_numpy(self.output)
        for name, value in (("output", written), *((f"present_{n[5:]}", values[n]) for n in self.past)):
            binding.bind_ortvalue_output(name, value)
        session.run_with_iobinding(binding)
        self.check(self.lengths, new)
        self.lengths = self.lengths + new

    def check(self, before: np.ndarray, new: np.ndarray) -> None:
        for row in range(B):
            length = int(before[row] + new[row])
            first = self.shape.first_position(self.layer, length)
            held = np.arange(first + 1, length + 1)
            np.testing.assert_array_equal(self.past["past_key"][row, 0, : len(held), 0], held)
            np.testing.assert_array_equal(self.past["past_value"][row, 0, : len(held), 0], 2 * held)
            ends = np.arange(int(before[row]), length)
            starts = np.maximum(0, ends + 1 - (self.layer.window or CTX))
            # Equal scores, so each token's output is the mean of the values that it may see.
            np.testing.assert_allclose(
                self.output[row, : len(ends), 0], starts + ends + 2, rtol=1e-5, err_msg=f"length {length}"
            )


def shapes(max_len: int, slack: int) -> tuple[GraphShape, GraphShape]:
    common: dict[str, Any] = {"batch": B, "ctx": CTX, "slack": slack}
    return GraphShape(role="prefill", max_len=max_len, **common), GraphShape(
        role="decode", max_len=1, **common
    )


@pytest.mark.parametrize(
    ("max_len", "slack"), [(s, slack) for s, slacks in SLACKS.items() for slack in slacks]
)
@pytest.mark.parametrize("window", [*WINDOWS, None])
def test_the_op_holds_what_first_position_says(window: int | None, max_len: int, slack: int) -> None:
    """Chunks of any length, single tokens between them, rows of different lengths, up to the last slot."""
    prefill, decode = shapes(max_len, slack)
    rows = Rows(prefill, FULL if window is None else sliding(window))
    rng = np.random.default_rng(max_len * 1000 + slack)
    while (room := CTX - int(rows.lengths.max())) > 0:
        if rng.random() < 0.3:
            rows.feed(decode, np.ones(B, np.int64))
        else:
            rows.feed(prefill, rng.integers(1, min(max_len, room) + 1, B))
    assert rows.lengths.max() == CTX


@pytest.mark.parametrize("slack", [3, 20])
def test_the_last_tokens_fed_again_are_the_same_where_the_window_has_not_moved(slack: int) -> None:
    """What allows a chat to go back: a cache of more tokens serves a shorter text with the same first
    position."""
    prefill, decode = shapes(4, slack)
    layer = sliding(8)
    went_back = 0
    for length in range(1, 60):
        rows = Rows(prefill, layer)
        while rows.lengths.max() < length:
            rows.feed(decode, np.ones(B, np.int64))
        for to in range(max(0, length - 6), length):
            if prefill.first_position(layer, to) == prefill.first_position(layer, length):
                rows.lengths = np.full(B, to)
                rows.feed(prefill, np.array([4, 1]))
                went_back += 1
                break
    assert went_back > 30


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 60), st.integers(0, 70), st.integers(2, 200), st.data())
def test_what_a_token_sees_is_always_held(window: int, slack: int, ctx: int, data: st.DataObject) -> None:
    shape, layer = GraphShape(role="decode", max_len=1, ctx=ctx, slack=slack), sliding(window)
    length = data.draw(st.integers(1, ctx))
    first = shape.first_position(layer, length)
    assert first <= max(0, length - window)
    assert length - first <= shape.capacity(layer)
    assert shape.first_position(layer, length - 1) <= first
    assert shape.first_position(FULL, length) == 0


def test_capacities() -> None:
    shape = GraphShape(role="prefill", max_len=16, ctx=100, slack=20)
    assert [shape.capacity(layer) for layer in (FULL, sliding(8), sliding(90), sliding(300))] == [
        120,
        28,
        110,
        120,
    ]
    assert [shape.evicts(layer) for layer in (FULL, sliding(8), sliding(99), sliding(100))] == [
        False,
        True,
        True,
        False,
    ]
    portable = GraphShape(role="prefill", max_len=16, ctx=100)
    assert (portable.capacity(sliding(8)), portable.evicts(sliding(8)), portable.limit) == (100, False, 100)
    assert portable.first_position(sliding(8), 100) == 0
    alone = GraphShape(role="prefill", max_len=16)
    assert (alone.limit, alone.capacity(FULL), alone.capacity(sliding(8))) == (16, 16, 16)


@pytest.mark.parametrize(
    "values",
    [
        {"role": "prefill", "max_len": 16, "slack": 16},
        {"role": "prefill", "max_len": 16, "ctx": 100, "slack": 14},
        {"role": "decode", "max_len": 1, "ctx": 100, "slack": -1},
        {"role": "decode", "max_len": 2, "ctx": 100},
    ],
)
def test_shapes_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GraphShape(**values)
