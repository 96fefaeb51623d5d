"""The generation loop over a mock model: lengths, chunks, ends, rows, memory. No ONNX Runtime, no time."""

from __future__ import annotations

import re

import pytest

from stillgraph import load
from stillgraph.errors import StillgraphError
from stillgraph.sampling import Sampling

V = 11
P, C = 4, 16


def prompt_of(length: int) -> list[int]:
    return [(3 * slot + 1) % V for slot in range(length)]


def tokens(steps) -> list[int]:
    return [step.token for step in steps]


@pytest.mark.parametrize("length", [1, P, P + 1, 2 * P, 2 * P + 1, C])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_prompt_of_any_length_gives_the_models_tokens(engine_of, greedy, length, in_place) -> None:
    engine, mock = engine_of(P, C, in_place=in_place)
    steps = list(engine.stream(prompt_of(length), max_new_tokens=3))
    assert tokens(steps) == greedy(prompt_of(length), 3, V)[: len(steps)]
    chunks = [(past, new) for role, past, new in mock.calls if role == "prefill"]
    assert chunks == [([start], [min(P, length - start)]) for start in range(0, length, P)]


@pytest.mark.parametrize(("in_place", "binds"), [(False, 4), (True, 2)])
def test_buffers_are_bound_once_for_each_direction(engine_of, in_place, binds) -> None:
    engine, mock = engine_of(in_place=in_place)
    for _ in range(2):
        list(engine.stream([1, 2, 3], max_new_tokens=5))
    assert mock.binds == binds


def test_a_prefill_without_a_cache_hands_its_slots_over(engine_of, greedy) -> None:
    engine, mock = engine_of(P, C, continues=False)
    assert tokens(engine.stream(prompt_of(P), max_new_tokens=6)) == greedy(prompt_of(P), 6, V)
    assert [past for role, past, _ in mock.calls if role == "decode"] == [[P + step] for step in range(5)]


@pytest.mark.parametrize("length", [1, 5, C - 1, C])
def test_the_context_ends_after_its_last_slot(engine_of, greedy, length) -> None:
    engine, mock = engine_of(P, C)
    steps = list(engine.stream(prompt_of(length), max_new_tokens=100))
    assert tokens(steps) == greedy(prompt_of(length), C - length + 1, V)
    assert [step.finish_reason for step in steps] == [None] * (C - length) + ["context"]
    assert max(past[0] + new[0] for _, past, new in mock.calls) == C


def test_length_ends_before_context_does(engine_of) -> None:
    engine, _ = engine_of(P, C)
    steps = list(engine.stream(prompt_of(C - 1), max_new_tokens=2))
    assert [step.finish_reason for step in steps] == [None, "length"]


def test_the_last_token_is_never_fed(engine_of) -> None:
    engine, mock = engine_of()
    list(engine.stream([1, 2], max_new_tokens=1))
    assert [role for role, _, _ in mock.calls] == ["prefill"]


def test_a_stop_token_ends_the_stream(engine_of, greedy) -> None:
    expected = greedy([1, 2], 4, V)
    assert expected[3] not in expected[:3]
    engine, _ = engine_of(stop=[expected[3]])
    steps = list(engine.stream([1, 2], max_new_tokens=9))
    assert tokens(steps) == expected
    assert (steps[-1].finish_reason, steps[-1].text) == ("stop", "")


class Letters:
    """A tokenizer whose token n is the nth letter, none of them special."""

    skipped = byte_ids = frozenset()

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def test_a_stop_token_has_no_text_even_where_it_is_an_ordinary_one(engine_of, greedy) -> None:
    expected = greedy([1, 2], 4, V)
    engine, _ = engine_of(stop=[expected[3]], text=Letters())
    steps = list(engine.stream([1, 2], max_new_tokens=9))
    assert [step.text for step in steps] == [*Letters().decode(expected[:3]), ""]


def test_what_a_stop_string_held_back_comes_at_the_end(engine_of, greedy) -> None:
    letters = Letters().decode(greedy([1, 2], 4, V))
    engine, _ = engine_of(text=Letters())
    steps = list(engine.stream([1, 2], max_new_tokens=4, stop=[letters[2:] + "?"]))
    assert [step.text for step in steps] == [*letters[:2], "", letters[2:]]
    steps = list(engine.stream([1, 2], max_new_tokens=9, stop=[letters[1:3]]))
    assert ["".join(step.text for step in steps), steps[-1].finish_reason] == [letters[0], "stop"]


def test_one_text_to_stop_at_is_one_text(engine_of, greedy) -> None:
    letters = Letters().decode(greedy([1, 2], 4, V))
    engine, _ = engine_of(text=Letters())
    found = [
        "".join(s.text for s in engine.stream([1, 2], stop=stop)) for stop in (letters[1:3], [letters[1:3]])
    ]
    assert found == [letters[0]] * 2


def test_other_stop_tokens_take_the_place_of_the_bundles(engine_of, greedy) -> None:
    expected = greedy([1, 2], 6, V)
    assert expected[1] != expected[3]
    engine, _ = engine_of(stop=[expected[1]])
    for stop_tokens, count in ((None, 2), ((), 6), ([expected[3]], expected.index(expected[3]) + 1)):
        found = tokens(engine.stream([1, 2], max_new_tokens=6, stop_tokens=stop_tokens))
        assert found == expected[:count]
        rows = engine.stream_batch([[1, 2]], max_new_tokens=6, stop_tokens=stop_tokens)
        assert [step.token for _, step in rows] == expected[:count]


def test_a_shared_prefix_is_not_computed_again(engine_of, greedy) -> None:
    engine, mock = engine_of(P, C)
    first = prompt_of(6)
    answer = tokens(engine.stream(first, max_new_tokens=3))
    held = first + answer[:2]  # the last token was never fed
    assert engine.graphs.cached == [held]
    mock.calls.clear()
    second = [*held, 5, 6]
    assert tokens(engine.stream(second, max_new_tokens=2)) == greedy(second, 2, V)
    assert mock.calls[0] == ("prefill", [8], [2])


def test_a_prefix_that_parts_is_computed_from_there(engine_of, greedy) -> None:
    engine, mock = engine_of(P, C)
    list(engine.stream([1, 2, 3, 4, 5, 6], max_new_tokens=2))
    mock.calls.clear()
    assert tokens(engine.stream([1, 2, 9], max_new_tokens=4)) == greedy([1, 2, 9], 4, V)
    assert mock.calls[0] == ("prefill", [2], [1])


def test_the_same_prompt_again_still_has_a_token_to_compute(engine_of, greedy) -> None:
    engine, mock = engine_of(P, C)
    for _ in range(2):
        mock.calls.clear()
        assert tokens(engine.stream([1, 2, 3], max_new_tokens=2)) == greedy([1, 2, 3], 2, V)
    assert mock.calls[0] == ("prefill", [2], [1])


def test_reset_forgets_the_cache(engine_of) -> None:
    engine, mock = engine_of(P, C)
    list(engine.stream([1, 2, 3], max_new_tokens=2))
    engine.reset()
    mock.calls.clear()
    list(engine.stream([1, 2, 3], max_new_tokens=2))
    assert mock.calls[0] == ("prefill", [0], [3])


def test_a_prefill_without_a_cache_begins_anew(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C, continues=False)
    for prompt in ([1, 2, 3, 4], [1, 2]):
        assert tokens(engine.stream(prompt, max_new_tokens=5)) == greedy(prompt, 5, V)


@pytest.mark.parametrize("continues", [True, False])
def test_one_graph_at_a_time(engine_of, greedy, continues) -> None:
    engine, mock = engine_of(P, C, continues=continues, one_at_a_time=True)
    assert mock.alive == ["prefill"]
    for prompt in ([1, 2, 3], [1, 2, 3, 4], [7]):
        stream = engine.stream(prompt, max_new_tokens=4)
        assert next(stream).token == greedy(prompt, 1, V)[0]
        assert mock.alive == ["prefill"]  # the first token comes before any change of graphs
        assert tokens(stream) == greedy(prompt, 4, V)[1:]
        assert mock.alive == ["decode"]
    assert mock.most_alive == 1


def test_both_graphs_stay_where_memory_allows(engine_of) -> None:
    engine, mock = engine_of()
    list(engine.stream([1], max_new_tokens=3))
    assert mock.alive == ["prefill", "decode"]


def test_rows_have_lengths_and_ends_of_their_own(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C, batch=3)
    prompts = [prompt_of(1), prompt_of(2 * P + 1), prompt_of(C - 2)]
    rows: list[list] = [[], [], []]
    for row, step in engine.stream_batch(prompts, max_new_tokens=6):
        rows[row].append(step)
    expected = [greedy(prompt, count, V) for prompt, count in zip(prompts, (6, 6, 3), strict=True)]
    assert [tokens(steps) for steps in rows] == expected
    assert [steps[-1].finish_reason for steps in rows] == ["length", "length", "context"]


def test_a_prompt_in_a_batch_is_row_0(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C, batch=2)
    assert tokens(engine.stream(prompt_of(7), max_new_tokens=5)) == greedy(prompt_of(7), 5, V)
    assert tokens(engine.stream([2, 4], max_new_tokens=5)) == greedy([2, 4], 5, V)


def test_rows_sample_from_streams_of_their_own(engine_of) -> None:
    engine, _ = engine_of(P, 64, batch=2, vocab=101)
    rows: list[list[int]] = [[], []]
    sampling = Sampling(temperature=9.0, seed=3)
    for row, step in engine.stream_batch([[1, 2], [1, 2]], sampling, max_new_tokens=20):
        rows[row].append(step.token)
    assert rows[0] != rows[1]
    engine.reset()
    assert tokens(engine.stream([1, 2], temperature=9.0, seed=3, max_new_tokens=20)) == rows[0]


def test_a_new_request_ends_the_one_before(engine_of) -> None:
    engine, _ = engine_of()
    first = engine.stream([1, 2])
    next(first)
    next(engine.stream([3, 4]))
    with pytest.raises(StillgraphError, match="another request has begun"):
        next(first)


def test_logits_that_are_no_numbers_are_no_token(engine_of) -> None:
    engine, _ = engine_of()
    engine.graphs._prefill.run = lambda: engine.graphs._prefill.logits.fill(float("nan"))
    with pytest.raises(StillgraphError, match="not finite") as caught:
        next(engine.stream([1, 2]))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "the prompt is empty"),
        ([1, V], f"token id {V} is outside the vocabulary of {V}"),
        ([-1], "token id -1 is outside"),
        ([1] * (C + 1), f"the prompt has {C + 1} tokens and the cache takes {C}"),
        ("text", "has no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused_at_once(engine_of, prompt, said) -> None:
    engine, mock = engine_of(P, C)
    with pytest.raises(StillgraphError, match=re.escape(said)):
        engine.stream(prompt)
    assert mock.calls == []


def test_a_prompt_over_max_len_names_both_numbers_and_the_export(engine_of) -> None:
    engine, _ = engine_of(P, C, continues=False)
    said = f"has {P + 1} tokens and the prefill graph takes {P}; .*export prefill --max-len {P} --ctx {C}"
    with pytest.raises(StillgraphError, match=said):
        engine.stream([1] * (P + 1))


def test_max_new_tokens_is_at_least_one(engine_of) -> None:
    engine, _ = engine_of()
    with pytest.raises(StillgraphError, match="max_new_tokens is 0"):
        engine.stream([1], max_new_tokens=0)


def test_more_prompts_than_rows_are_refused(engine_of) -> None:
    engine, _ = engine_of(batch=2)
    with pytest.raises(StillgraphError, match="3 prompts for graphs of 2 rows"):
        engine.stream_batch([[1]] * 3)
    for images in ([[]], [[], [], ["c"]]):
        with pytest.raises(StillgraphError, match=f"images has {len(images)} lists for 2 prompts"):
            engine.stream_batch([[1], [2]], images=images)


@pytest.mark.parametrize("prompts", [None, 5, "ab"])
def test_a_batch_is_a_list_of_prompts(engine_of, refused, prompts) -> None:
    engine, _ = engine_of()
    with refused("read prompt", "prompts is of type", "give a list of prompts"):
        engine.stream_batch(prompts)


@pytest.mark.parametrize("bundle", [None, 5])
def test_a_bundle_is_a_path(refused, bundle) -> None:
    with refused("load bundle", "a bundle was given as", "give the path of its folder"):
        load(bundle)


def test_elapsed_leaves_loading_out(engine_of, monkeypatch) -> None:
    engine, _ = engine_of(one_at_a_time=True)
    clock = iter(range(0, 10_000, 10))  # every look at the clock takes 10 s
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    steps = list(engine.stream([1, 2], max_new_tokens=3))
    assert [step.elapsed for step in steps] == pytest.approx([10, 30, 40])  # with it: 10, 40, 50
