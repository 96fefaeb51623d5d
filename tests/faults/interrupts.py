"""A real signal at a random instant of a request; the next ones are right."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from stillgraph.engine import Engine
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import PROMPTS, answer, expected, open_, tokens

CHAT = len(PROMPTS)


def int4(seed: int, scratch: Path) -> Trial:
    return _trial("int4", open_("int4"), seed, "compiled")


def fp32(seed: int, scratch: Path) -> Trial:
    return _trial("fp32", open_("fp32"), seed)


def unloading(seed: int, scratch: Path) -> Trial:
    return _trial("int4", open_("int4", unload_prefill=True), seed, "compiled")


def growing(seed: int, scratch: Path) -> Trial:
    return _trial("growing", open_("growing"), seed)


def picture(seed: int, scratch: Path) -> Trial:
    return _trial("seeing", open_("seeing"), seed, first=CHAT)


def _trial(name: str, engine: Engine, seed: int, kind: str = "plain", first: int = 0) -> Trial:
    """first: the prompt that is interrupted, and asked again."""
    right = [tokens(each) for each in expected(name, kind)]
    began = time.perf_counter()
    answer(engine, first)
    length = time.perf_counter() - began

    def trial(number: int) -> Outcome:
        random = Random(f"{seed} {name} {number}")
        other, at = random.randrange(1, CHAT), random.uniform(1e-4, length)
        if random.random() < 0.7:
            engine.reset()  # else most of the prompt is in the cache
        came = interrupted(lambda: answer(engine, first), at)
        what = f"trial {number}, {name}, after {at * 1000:.2f} ms, which {'came' if came else 'was late'}"
        return outcome(
            lambda: all(tokens(answer(engine, index)) == right[index] for index in (first, other)), what
        )

    return trial


def interrupted(call: Callable[[], object], seconds: float) -> bool:
    """Call, and raise KeyboardInterrupt from a signal so many seconds later; whether it came in time."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False
