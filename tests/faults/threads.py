"""Eight threads that ask at once: every answer is right, or refused where one engine serves them all."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from random import Random

from stillgraph.engine import Engine
from stillgraph.errors import StillgraphError
from stillgraph.pool import Pool
from tests.faults.outcome import Outcome, Trial, outcome
from tests.faults.subjects import COUNT, PROMPTS, expected, open_, tokens

THREADS = 8
ROUND = 64  # requests that are asked together
PATIENCE = 2.0  # seconds


def one_engine(seed: int, scratch: Path) -> Trial:
    return _trial(open_("int4"), seed)


def pool_of_1(seed: int, scratch: Path) -> Trial:
    return _trial(Pool([open_("int4")]), seed)


def pool_of_2(seed: int, scratch: Path) -> Trial:
    return _trial(Pool([open_("int4"), open_("int4")]), seed)


def _trial(serves: Engine | Pool, seed: int) -> Trial:
    right = [tokens(each) for each in expected("int4", "compiled")]
    threads = ThreadPoolExecutor(THREADS)

    def request(number: int) -> Outcome:
        random = Random(f"{seed} threads {number}")
        index = random.randrange(len(PROMPTS))
        made = list[int]()

        def call() -> bool:
            try:
                steps = serves.stream(PROMPTS[index], max_new_tokens=COUNT, stop_tokens=())
                made.extend(step.token for step in steps)
            except StillgraphError:
                if isinstance(serves, Pool) or made != right[index][: len(made)]:
                    return False  # a pool refuses none, and what was told before a refusal is right too
                time.sleep(random.uniform(0, PATIENCE))  # else almost all are refused
                raise
            return made == right[index]

        return outcome(call, f"request {number}, prompt {index}: {made}")

    # A trial is one request; they are made a round at a time, and told one by one.
    rounds = (threads.map(request, range(start, start + ROUND)) for start in range(0, 1 << 40, ROUND))
    found = chain.from_iterable(rounds)
    return lambda number: next(found)
