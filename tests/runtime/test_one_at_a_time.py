"""One engine, several callers: threads, tasks of asyncio, and what is left after `close`. The mock model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from stillgraph.engine import Engine
from stillgraph.errors import StillgraphError

V, P, C = 11, 4, 16
PATIENCE = 30  # seconds after which a test that hangs fails


class Gate:
    """Holds a graph's next run until it is opened."""

    def __init__(self, graph: Any) -> None:
        self._held = [(graph, graph.run)]
        self.entered, self.opened = threading.Event(), threading.Event()
        graph.run = self

    def __call__(self) -> None:
        graph, run = self._held.pop()
        graph.run = run
        self.entered.set()
        assert self.opened.wait(PATIENCE)
        run()


@contextmanager
def inside_a_step(engine: Engine) -> Iterator[list[int]]:
    """While another thread is inside its second step; afterwards its tokens are in what is yielded."""
    gate, found, stream = Gate(engine.graphs._decode), list[int](), engine.stream([1, 2], max_new_tokens=3)  # type: ignore[attr-defined]
    thread = threading.Thread(target=lambda: found.extend(step.token for step in stream))
    thread.start()
    assert gate.entered.wait(PATIENCE)
    try:
        yield found
    finally:
        gate.opened.set()
        thread.join(PATIENCE)


def test_a_request_inside_anothers_step_is_refused_and_harms_nothing(engine_of, greedy, refused) -> None:
    engine, mock = engine_of(P, C)
    with inside_a_step(engine) as found:
        before = len(mock.calls)
        for begin in (engine.stream, engine.score, engine.logits):
            with refused("generate", "another request is running on this engine", "load a second engine"):
                begin([3, 4])
        with refused("generate", "another request is running on this engine"):
            engine.reset()
        assert len(mock.calls) == before
    assert found == greedy([1, 2], 3, V)
    assert [step.token for step in engine.stream([3, 4], max_new_tokens=2)] == greedy([3, 4], 2, V)


def test_a_stream_begun_before_anothers_step_is_refused_inside_it(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C)
    early = engine.stream([3, 4])
    with inside_a_step(engine) as found, pytest.raises(StillgraphError, match="another request is running"):
        next(early)
    assert found == greedy([1, 2], 3, V)


def test_a_stream_ends_where_the_cache_is_forgotten_under_it(engine_of, greedy) -> None:
    """Its next step would be computed from nothing, and be wrong."""
    engine, _ = engine_of(P, C)
    stream = engine.stream([3, 1, 4], max_new_tokens=5)
    assert [next(stream).token, next(stream).token] == greedy([3, 1, 4], 2, V)
    engine.reset()
    with pytest.raises(StillgraphError, match="another request"):
        next(stream)
    assert [step.token for step in engine.stream([3, 1, 4], max_new_tokens=5)] == greedy([3, 1, 4], 5, V)


def test_an_error_in_a_step_does_not_keep_others_out(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C)
    run = engine.graphs._prefill.run
    engine.graphs._prefill.run = lambda: engine.graphs._prefill.logits.fill(float("nan"))
    with pytest.raises(StillgraphError, match="not finite"):
        next(engine.stream([1, 2]))
    engine.graphs._prefill.run = run
    assert [step.token for step in engine.stream([3, 4], max_new_tokens=2)] == greedy([3, 4], 2, V)


USES: list[Callable[[Engine], object]] = [
    lambda engine: engine.stream([1]),
    lambda engine: engine.stream_batch([[1]]),
    lambda engine: engine.score([1, 2]),
    lambda engine: engine.logits([1]),
    lambda engine: engine.ids([1]),
    lambda engine: engine.decode([1]),
    lambda engine: engine.reset(),
    lambda engine: engine.load_seconds,
    lambda engine: asyncio.run(anext(engine.astream([1]))),
]


@pytest.mark.parametrize("use", USES)
def test_a_closed_engine_says_so(engine_of, refused, use) -> None:
    engine, _ = engine_of()
    engine.close()
    with refused("generate", f"the engine of {engine.bundle} is closed", "load the bundle again"):
        use(engine)


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_close_lets_go_of_the_graphs_whatever_streams_are_left(engine_of, refused, one_at_a_time) -> None:
    engine, mock = engine_of(one_at_a_time=one_at_a_time)
    with engine as entered:
        assert entered is engine
        stream, late = engine.stream([1, 2], max_new_tokens=5), engine.stream([1, 2], max_new_tokens=5)
        next(late)
        next(late)
        assert mock.alive
    assert mock.alive == []
    for each in (stream, late):
        with refused("generate", ""):
            next(each)
    engine.close()


def test_close_waits_for_the_step_that_another_thread_is_in(engine_of) -> None:
    engine, mock = engine_of()
    gate, stream = Gate(engine.graphs._decode), engine.stream([1, 2], max_new_tokens=2)
    found = list[object]()
    threads = [
        threading.Thread(target=lambda: found.extend(stream)),
        threading.Thread(target=lambda: (engine.close(), found.append("closed"))),
    ]
    threads[0].start()
    assert gate.entered.wait(PATIENCE)
    threads[1].start()
    threads[1].join(0.05)
    assert threads[1].is_alive()
    assert mock.alive
    gate.opened.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(found) == 3
    assert mock.alive == []


def test_close_keeps_the_error_that_ended_the_block(engine_of) -> None:
    engine, mock = engine_of()
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    assert mock.alive == []


def test_steps_come_to_asyncio_while_its_loop_goes_on(engine_of, greedy) -> None:
    engine, _ = engine_of(P, C)

    async def main() -> list[int]:
        gate, stream = Gate(engine.graphs._decode), engine.astream([1, 2], max_new_tokens=3)
        found = [(await anext(stream)).token]
        second = asyncio.ensure_future(anext(stream))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)  # the loop runs while the step does
        with pytest.raises(StillgraphError, match="another request is running"):
            await anext(engine.astream([3, 4]))
        gate.opened.set()
        found.append((await second).token)
        return [*found, *[step.token async for step in stream]]

    assert asyncio.run(main()) == greedy([1, 2], 3, V)


@pytest.mark.parametrize("times", [1, 3])
def test_a_canceled_step_ends_before_the_task_does(engine_of, greedy, caplog, times) -> None:
    engine, mock = engine_of(P, C)

    async def main() -> None:
        gate, stream = Gate(engine.graphs._decode), engine.astream([1, 2], max_new_tokens=9)
        await anext(stream)
        second = asyncio.ensure_future(anext(stream))
        while not gate.entered.is_set():
            await asyncio.sleep(0.001)
        for _ in range(times):
            second.cancel()
            await asyncio.sleep(0.01)
            assert not second.done()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await second
        calls = len(mock.calls)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert len(mock.calls) == calls
        found = [step.token async for step in engine.astream([3, 4], max_new_tokens=2)]
        assert found == greedy([3, 4], 2, V)

    asyncio.run(main())
    assert caplog.records == []


def test_a_stream_that_is_left_closes_the_one_below(engine_of) -> None:
    engine, _ = engine_of(P, C)
    closed = list[str]()
    original = engine.stream

    def stream(*args: Any, **options: Any) -> Iterator[Any]:
        try:
            yield from original(*args, **options)
        finally:
            closed.append("closed")

    engine.stream = stream

    async def main() -> None:
        steps = engine.astream([1, 2], max_new_tokens=9)
        async for _ in steps:
            break
        assert closed == []
        await steps.aclose()
        assert closed == ["closed"]

    asyncio.run(main())


def test_a_wrong_option_comes_with_the_first_step(engine_of) -> None:
    engine, _ = engine_of()

    async def main() -> None:
        with pytest.raises(StillgraphError, match="max_new_tokens is 0"):
            await anext(engine.astream([1], max_new_tokens=0))

    asyncio.run(main())
