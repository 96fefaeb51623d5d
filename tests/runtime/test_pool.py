"""Many callers on a few engines: each gets its own text, in turn, whatever the others do. The mock model."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillgraph.errors import StillgraphError
from stillgraph.pool import Pool
from tests.runtime.test_one_at_a_time import PATIENCE, Gate

V, P, C = 11, 4, 16
PROMPTS = [[(3 * first + slot * slot) % V for slot in range(1 + first % 9)] for first in range(40)]


@pytest.fixture
def pool_of(engine_of):
    """A pool of so many engines, and the engines."""
    pools = []

    def make(count: int, limit: int | None = None):
        engines = [engine_of(P, C)[0] for _ in range(count)]
        pools.append(Pool(engines, limit))
        return pools[-1], engines

    yield make
    for pool in pools:
        pool.close()


def tokens(pool: Pool, prompt: list[int], count: int = 4) -> list[int]:
    return [step.token for step in pool.stream(prompt, max_new_tokens=count)]


@pytest.mark.parametrize("engines", [1, 3])
def test_every_thread_gets_its_own_text(pool_of, greedy, engines) -> None:
    pool, _ = pool_of(engines)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda prompt: tokens(pool, prompt), PROMPTS))
    assert found == [greedy(prompt, 4, V) for prompt in PROMPTS]


@pytest.mark.parametrize("engines", [1, 3])
def test_and_so_does_every_task(pool_of, greedy, engines) -> None:
    pool, _ = pool_of(engines)

    async def one(prompt: list[int]) -> list[int]:
        return [step.token async for step in pool.astream(prompt, max_new_tokens=4)]

    async def main() -> list[list[int]]:
        return await asyncio.gather(*map(one, PROMPTS))

    assert asyncio.run(main()) == [greedy(prompt, 4, V) for prompt in PROMPTS]


def test_a_request_is_computed_however_slowly_it_is_read(pool_of, greedy) -> None:
    pool, _ = pool_of(1)
    slow = pool.stream([1, 2], max_new_tokens=4)
    first = next(slow).token
    assert tokens(pool, [3, 4]) == greedy([3, 4], 4, V)
    assert [first, *(step.token for step in slow)] == greedy([1, 2], 4, V)


def test_one_that_is_closed_leaves_the_engine_to_the_next(pool_of, greedy) -> None:
    pool, (engine,) = pool_of(1)
    gate = Gate(engine.graphs._decode)
    stream = pool.stream([1, 2], max_new_tokens=10)
    next(stream)
    assert gate.entered.wait(PATIENCE)
    stream.close()
    gate.opened.set()
    assert tokens(pool, [3, 4]) == greedy([3, 4], 4, V)
    assert len(engine.graphs.cached[0]) == 2 + 3  # of the second request


def test_what_is_refused_is_told_to_its_own_reader(pool_of, greedy, refused) -> None:
    pool, _ = pool_of(1)
    with refused("read prompt", "99"):
        tokens(pool, [99])
    assert tokens(pool, [3, 4]) == greedy([3, 4], 4, V)


def test_a_limit_to_those_who_wait(pool_of, greedy, refused) -> None:
    pool, (engine,) = pool_of(1, limit=1)
    gate, found = Gate(engine.graphs._decode), list[list[int]]()
    running = pool.stream([1, 2], max_new_tokens=4)
    first = next(running).token
    assert gate.entered.wait(PATIENCE)
    waiting = threading.Thread(target=lambda: found.append(tokens(pool, [3, 4])))
    waiting.start()
    while pool._requests.qsize() == 0:
        pass
    with refused("generate", "1 requests wait already", "ask again later"):
        next(pool.stream([5, 6]))
    gate.opened.set()
    waiting.join(PATIENCE)
    assert [first, *(step.token for step in running)] == greedy([1, 2], 4, V)
    assert found == [greedy([3, 4], 4, V)]


def test_closing_ends_what_runs_and_refuses_what_waits(pool_of, refused) -> None:
    pool, (engine,) = pool_of(1)
    gate, said = Gate(engine.graphs._decode), list[str]()

    def waits() -> None:
        try:
            tokens(pool, [3, 4])
        except StillgraphError as error:
            said.append(str(error))

    running = pool.stream([1, 2], max_new_tokens=10)
    next(running)
    assert gate.entered.wait(PATIENCE)
    waiting, closing = threading.Thread(target=waits), threading.Thread(target=pool.close)
    waiting.start()
    while pool._requests.qsize() == 0:
        pass
    closing.start()
    while not pool._closed:
        pass
    gate.opened.set()
    for thread in (waiting, closing):
        thread.join(PATIENCE)
    assert said == ["generate: the pool is closed; make another."]
    with refused("generate", "the pool is closed"):
        list(running)
    with refused("generate", "the pool is closed"):
        next(pool.stream([1]))
    with refused("generate", "the engine of"):
        engine.stream([1])


def test_a_pool_without_engines(refused) -> None:
    with refused("generate", "no engine"):
        Pool([])
