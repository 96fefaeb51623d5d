"""An interrupt at any bytecode of a request leaves an engine that answers the next one right."""

from __future__ import annotations

import pytest

from stillgraph import engine, kv_cache
from tests.interrupts import interruptions
from tests.runtime.sliding_model import engine_of as sliding_engine
from tests.runtime.sliding_model import greedy as sliding_greedy

V, P, C = 11, 4, 16
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]  # three chunks
OTHER = [8, 7, 10, 8, 2, 8, 4, 5, 9]  # so that the buffers hold what is wrong for the first


@pytest.fixture(autouse=True)
def no_collection(monkeypatch) -> None:
    """It takes most of the time, and has no state."""
    for module in (engine, kv_cache):
        monkeypatch.setattr(module, "return_memory", lambda: None)


def tokens(made: engine.Engine, prompt: list[int], count: int = 3) -> list[int]:
    return [step.token for step in made.stream(prompt, max_new_tokens=count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"in_place": True}, {"continues": False, "max_len": C}, {"one_at_a_time": True}, {"batch": 2}],
    ids=["two sets of buffers", "one set", "a prefill without a cache", "one graph at a time", "two rows"],
)
def test_a_request_that_was_cut_off_poisons_none(engine_of, greedy, options) -> None:
    made, _ = engine_of(**{"max_len": P, "ctx": C} | options)
    for where in interruptions(lambda: tokens(made, PROMPT)):
        assert tokens(made, PROMPT) == greedy(PROMPT, 3, V), where
        assert tokens(made, OTHER) == greedy(OTHER, 3, V), where


def test_nor_the_windows_that_have_moved() -> None:
    windows = (3, None)
    made, _ = sliding_engine(windows, max_len=4, ctx=24, slack=3)
    for where in interruptions(lambda: tokens(made, PROMPT)):
        assert tokens(made, PROMPT) == sliding_greedy(PROMPT, 3, windows), where
        assert tokens(made, OTHER) == sliding_greedy(OTHER, 3, windows), where


def test_an_interrupt_between_two_turns_keeps_the_rest_of_a_chat_right(engine_of, greedy) -> None:
    made, _ = engine_of(P, C)
    longer = [*PROMPT, *greedy(PROMPT, 2, V), 7]
    for where in interruptions(lambda: tokens(made, longer)):
        assert tokens(made, PROMPT, 2) == greedy(PROMPT, 2, V), where
        assert tokens(made, longer) == greedy(longer, 3, V), where


def test_closing_that_was_cut_off_can_be_done_again(engine_of, refused) -> None:
    engines = list[engine.Engine]()

    def close() -> None:
        engines.append(engine_of(P, C)[0])
        engines[-1].close()

    for where in interruptions(close):
        engines[-1].close()
        with refused("generate", "is closed"):
            engines[-1].stream(PROMPT)
        assert where
