"""The loop over caches whose sliding layers move their window on, with a numpy model of the op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillgraph.spec import GraphShape
from tests.runtime.sliding_model import (
    V,
    batch_tokens,
    engine_of,
    first_held,
    greedy,
    layer_of,
    layers_of,
    prompt_of,
)


@given(st.integers(1, 40), st.integers(0, 70), st.integers(0, 300))
@settings(deadline=None, max_examples=100)
def test_first_position_is_the_rule_of_the_op(window: int, slack: int, length: int) -> None:
    shape, layer = GraphShape(role="decode", max_len=1, ctx=300, slack=slack), layers_of(window)[0]
    assert shape.first_position(layer, length) == first_held(shape.capacity(layer), window, length)


# Two head sizes, and two layers that read what earlier ones have written.
MIXED = (
    layer_of(5, kv_heads=2, head_dim=3),
    layer_of(None, head_dim=4),
    layer_of(5, kv_heads=2, head_dim=3, kv_from=0),
    layer_of(9, kv_heads=3, head_dim=2),
    layer_of(None, head_dim=4, kv_from=1),
)


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_layers_of_other_heads_and_layers_that_read_another_s_cache(one_at_a_time: bool) -> None:
    windows, ctx = [layer.window for layer in MIXED], 60
    shared = {index: layer.kv_from for index, layer in enumerate(MIXED) if layer.kv_from is not None}
    for length in (1, 4, 5, 9, 31, ctx - 1):
        engine, _ = engine_of(layers=MIXED, ctx=ctx, one_at_a_time=one_at_a_time)
        tokens = [step.token for step in engine.stream(prompt_of(length), max_new_tokens=1000)]
        assert tokens == greedy(prompt_of(length), ctx - length + 1, windows, shared)
    assert tokens != greedy(prompt_of(length), ctx - length + 1, windows), "sharing makes a difference"


GEOMETRIES: list[tuple[tuple[int | None, ...], int, int]] = [  # windows, slack, max_len
    ((5, None, 8), 3, 4),
    ((5, 5), 16, 4),
    ((48, None), 15, 16),
    ((1, 7), 0, 1),
    ((None, 12, 200), 6, 7),
]


@pytest.mark.parametrize(("windows", "slack", "max_len"), GEOMETRIES)
def test_long_texts_past_several_evictions(windows: Any, slack: int, max_len: int) -> None:
    ctx = 150
    for length in (1, max_len, max_len + 1, 2 * max_len + 1, 77, ctx - 1, ctx):
        engine, calls = engine_of(windows, slack, max_len, ctx)
        steps = list(engine.stream(prompt_of(length), max_new_tokens=1000))
        assert [step.token for step in steps] == greedy(prompt_of(length), ctx - length + 1, windows)
        assert steps[-1].finish_reason == "context"
        assert sum(role == "prefill" for role, _, _ in calls) == -(-length // max_len)


def test_one_graph_at_a_time_over_a_window_that_moves() -> None:
    engine, _ = engine_of(one_at_a_time=True)
    for length in (90, 30):
        assert batch_tokens(engine, [prompt_of(length)], 40) == [greedy(prompt_of(length), 40, (5, None, 8))]


def test_a_row_of_one_token_beside_one_of_900() -> None:
    windows = (48, None, 5)
    engine, calls = engine_of(windows, slack=63, max_len=64, ctx=1000, batch=3)
    prompts = [prompt_of(1), prompt_of(900), prompt_of(17)]  # 15 chunks: 17 tokens last, 1 token cannot
    assert batch_tokens(engine, prompts, 20) == [greedy(prompt, 20, windows) for prompt in prompts]
    assert sum(role == "prefill" for role, _, _ in calls) == 15
    past = np.array([call[1] for call in calls[:15]])
    assert (past[:, 0] == 0).all()  # waits, and writes its one token again
    assert (np.diff(past[:, 1:], axis=0) > 0).all()  # the others never feed a slot twice


@pytest.mark.parametrize("lengths", [(150, 3, 60), (1, 149, 140), (120, 130, 1)])
def test_rows_that_end_while_others_go_on(lengths: tuple[int, ...]) -> None:
    """Rows end one by one at ctx; what a row is fed after its end must not be seen, then or later."""
    windows = (5, None, 8)
    engine, _ = engine_of(windows, batch=3)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(lengths)]
    expected = [greedy(prompt, 150 - len(prompt) + 1, windows) for prompt in prompts]
    assert batch_tokens(engine, prompts, 1000) == expected
    longer = [[*prompt, *answer][:120] for prompt, answer in zip(prompts, expected, strict=True)]
    assert batch_tokens(engine, longer, 9) == [greedy(prompt, 9, windows) for prompt in longer]


@pytest.mark.parametrize("stop", range(0, V, 20))
def test_rows_that_stop_early(stop: int) -> None:
    windows, stops = (5, None, 8), [stop, stop + 1, stop + 2]
    engine, _ = engine_of(windows, batch=3, stop=stops)
    prompts = [prompt_of(length, stop) for length in (9, 1, 70)]
    for _ in range(2):  # and once more over what the first left
        found = batch_tokens(engine, prompts, 60)
        for prompt, tokens in zip(prompts, found, strict=True):
            whole = greedy(prompt, 60, windows)
            ends = next((i for i, token in enumerate(whole) if token in stops), len(whole) - 1)
            assert tokens == whole[: ends + 1]


def test_what_a_chat_appends_is_all_that_is_computed() -> None:
    """Past any number of evictions, as long as nothing of the cache is taken back."""
    engine, calls = engine_of(slack=3, max_len=4)
    ids = prompt_of(6)
    for turn in range(10):
        held = len(engine.graphs.cached[0])
        calls.clear()
        answer = batch_tokens(engine, [ids], 7)[0]
        assert answer == greedy(ids, 7, (5, None, 8))
        assert calls[0][1] == [held], f"turn {turn}"
        ids = [*ids, *answer, *prompt_of(4, turn)]


@pytest.mark.parametrize(("back", "start"), [(1, 89), (3, 87), (6, 0)])
def test_a_text_that_parts_goes_back_only_where_the_window_has_not_moved(back: int, start: int) -> None:
    """Capacity 20 and window 5 move on by 16 tokens: at 21, 37, 53, 69, 85; 90 tokens hold those from 80."""
    engine, calls = engine_of((5, None), slack=15, max_len=16)
    ids = prompt_of(90)
    batch_tokens(engine, [ids], 1)
    calls.clear()
    parted = [*ids[: 90 - back], (ids[90 - back] + 1) % V, 4]
    assert batch_tokens(engine, [parted], 30) == [greedy(parted, 30, (5, None))]
    assert calls[0][1] == [start]


def test_a_row_with_too_little_left_for_every_chunk_begins_anew() -> None:
    """One new token beside 15 chunks; the 41st moves the window of 5 on, so it cannot be fed 15 times."""
    engine, calls = engine_of(batch=2)
    batch_tokens(engine, [prompt_of(40), prompt_of(5)], 1)
    calls.clear()
    prompts = [[*prompt_of(40), 7], prompt_of(60, 9)]
    assert batch_tokens(engine, prompts, 9) == [greedy(prompt, 9, (5, None, 8)) for prompt in prompts]
    assert calls[0][1] == [0, 0]


def test_every_layer_has_a_say_in_going_back() -> None:
    """The layer of window 20 has room for all so far; that of window 4 has moved on."""
    engine, calls = engine_of((20, 4, None), slack=3, max_len=4)
    ids = prompt_of(15)
    batch_tokens(engine, [ids], 1)
    calls.clear()
    parted = [*ids[:9], (ids[9] + 1) % V]
    assert batch_tokens(engine, [parted], 9) == [greedy(parted, 9, (20, 4, None))]
    assert calls[0][1] == [0]


@st.composite
def requests(draw: st.DrawFn, rows: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Requests of up to `rows` prompts: each is (how much of the row's last text it keeps, new tokens)."""
    prompt = st.tuples(st.integers(0, 130), st.integers(1, 60))
    one = st.tuples(st.lists(prompt, min_size=1, max_size=rows), st.integers(1, 60))
    return draw(st.lists(one, min_size=1, max_size=5))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(GEOMETRIES), st.integers(1, 3), st.integers(0, 2**16))
def test_any_requests_give_what_a_fresh_engine_gives(
    data: st.DataObject, geometry: Any, rows: int, seed: int
) -> None:
    windows, slack, max_len = geometry
    engine, _ = engine_of(windows, slack, max_len, ctx=130, batch=rows)
    rng, texts = np.random.default_rng(seed), [[] for _ in range(rows)]
    for prompts, count in data.draw(requests(rows)):
        asked = [
            [*text[:kept], *rng.integers(0, V, new).tolist()][:130]
            for text, (kept, new) in zip(texts, prompts, strict=False)
        ]
        fresh, _ = engine_of(windows, slack, max_len, ctx=130, batch=rows)
        found = batch_tokens(engine, asked, count)
        assert found == batch_tokens(fresh, asked, count)
        assert found == [greedy(ids, min(count, 130 - len(ids) + 1), windows) for ids in asked]
        texts[: len(asked)] = [[*ids, *tokens] for ids, tokens in zip(asked, found, strict=True)]
