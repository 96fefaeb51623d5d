"""Thousands of generations in one process, whose memory stays as it is."""

from __future__ import annotations

from pathlib import Path
from random import Random
from statistics import median

from stillgraph.engine import Engine
from stillgraph.metrics import rss_mb
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import COUNT, PROMPTS, answer, expected, open_, tokens

WARM = 200  # generations, after which memory may not grow
SPAN = 50  # those whose median is compared
GROWTH = 0.02
SHORT = range(2, len(PROMPTS))


def generations(seed: int, scratch: Path) -> Trial:
    """Of each ten: four with both graphs, one with one at a time, three of two rows, one growing, one of a
    picture."""
    kept, unloading = open_("int4"), open_("int4", unload_prefill=True)
    rows, growing, seeing = open_("rows"), open_("growing"), open_("seeing")
    sizes = list[float]()

    def one(number: int, random: Random) -> bool:
        turn, index = number % 10, random.choice(SHORT)
        if turn < 5:
            return _same(unloading if turn == 4 else kept, "int4", "compiled", index, random)
        if turn < 8:
            return _rows(rows, random)
        return _same(growing, "growing", "plain", index, random) if turn == 8 else _picture(seeing)

    def trial(number: int) -> Outcome:
        found = outcome(lambda: one(number, Random(f"{seed} endurance {number}")), f"generation {number}")
        sizes.append(rss_mb() or 0.0)
        if len(sizes) < WARM + 2 * SPAN or found.kind != "right":
            return found
        before, now = median(sizes[WARM : WARM + SPAN]), median(sizes[-SPAN:])
        if now > before * (1 + GROWTH):
            return Outcome("wrong", f"generation {number}: {now:.1f} MB, {before:.1f} MB after {WARM}")
        return Outcome("right", f"note RSS {before:.1f} MB after {WARM}, {now:.1f} MB at the end")

    return trial


def _same(engine: Engine, name: str, kind: str, index: int, random: Random) -> bool:
    if random.random() < 0.2:
        engine.reset()
    return tokens(answer(engine, index)) == tokens(expected(name, kind)[index])


def _picture(engine: Engine) -> bool:
    return tokens(answer(engine, len(PROMPTS))) == tokens(expected("seeing")[len(PROMPTS)])


def _rows(engine: Engine, random: Random) -> bool:
    chosen = [random.choice(SHORT) for _ in range(random.choice([1, 2]))]
    made: list[list[int]] = [[] for _ in chosen]
    prompts = [PROMPTS[index] for index in chosen]
    for row, step in engine.stream_batch(prompts, max_new_tokens=COUNT, stop_tokens=()):
        made[row].append(step.token)
    return made == [tokens(expected("rows")[index]) for index in chosen]
