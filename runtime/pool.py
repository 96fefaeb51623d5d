"""Requests of many callers, each computed in its turn by one of a few engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeAlias

from stillgraph.engine import Engine
from stillgraph.errors import StillgraphError
from stillgraph.prompts import Prompt
from stillgraph.row import Step

STAGE = "generate"
Item: TypeAlias = "Step | Exception | None"  # None is the end


class Full(StillgraphError):
    """As many requests wait as may."""


class Closed(StillgraphError):
    """The pool is closed."""


@dataclass(eq=False)
class Request:
    """A request that waits or is computed; `put` takes its steps to whoever reads them, from any thread."""

    prompt: Prompt
    options: dict[str, Any]
    put: Callable[[Item], object]
    canceled: threading.Event = field(default_factory=threading.Event)


class Pool:
    """Engines that serve any number of threads and tasks; `with` closes it, and them.

    A request waits until an engine is free, in the order of the first reads, and is then computed in a thread
    of the pool, however slowly it is read. Engines of one bundle map one weights file: of weights that are
    not packed at loading, or were by 'stillgraph compile', another engine costs only a cache and buffers.
    limit: how many may wait; one more is refused with `Full`, and all use after `close` with `Closed`, which
    are StillgraphErrors. Those that were closed while they waited do not count.
    """

    def __init__(self, engines: Sequence[Engine], limit: int | None = None) -> None:
        if not engines:
            raise StillgraphError(STAGE, "a pool was given no engine", "load one")
        self._engines, self._limit, self._closed = tuple(engines), limit, False
        self._requests = SimpleQueue[Request | None]()
        self._waiting: set[Request] = set()
        self._computed: dict[Engine, Request] = {}
        self._lock = threading.Lock()  # while it is asked, or closed
        self._threads = [threading.Thread(target=self._work, args=(one,), daemon=True) for one in engines]
        for thread in self._threads:
            thread.start()

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Step]:
        """`Engine.stream`, with its options, when its turn has come. Closed early, it ends after a step.

        What `Engine.stream` raises at once comes with the first step.
        """
        steps = SimpleQueue[Item]()
        request = self._ask(prompt, options, steps.put)
        try:
            while (step := _step(steps.get())) is not None:
                yield step
        finally:
            request.canceled.set()

    async def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Step]:
        """`stream` for `async for`: waiting takes no thread. Closed or canceled, it ends after a step."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[Item]()
        put = steps.put_nowait
        request = self._ask(prompt, options, lambda item: loop.call_soon_threadsafe(put, item))
        try:
            while (step := _step(await steps.get())) is not None:
                yield step
        finally:
            request.canceled.set()

    @property
    def closed(self) -> bool:
        """Whether all use is refused."""
        return self._closed

    def close(self) -> None:
        """End the requests that run after their step, refuse those that wait, and close the engines."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for request in list(self._computed.values()):
                request.canceled.set()
            for _ in self._threads:
                self._requests.put(None)
        for thread in self._threads:
            thread.join()
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, prompt: Prompt, options: dict[str, Any], put: Callable[[Item], object]) -> Request:
        request = Request(prompt, options, put)
        with self._lock:
            if self._closed:
                raise closed()
            asked = len(self._computed) + sum(not other.canceled.is_set() for other in self._waiting)
            if self._limit is not None and asked >= self._limit + len(self._engines):
                raise Full(STAGE, f"{self._limit} requests wait already", "ask again later")
            self._waiting.add(request)
            self._requests.put(request)
        return request

    def _work(self, engine: Engine) -> None:
        while (request := self._requests.get()) is not None:
            with self._lock:
                self._waiting.remove(request)
                self._computed[engine] = request
            try:
                self._compute(engine, request)
            finally:
                del self._computed[engine]

    def _compute(self, engine: Engine, request: Request) -> None:
        end: Item = None
        try:
            if self._closed:
                raise closed()
            if not request.canceled.is_set():
                for step in engine.stream(request.prompt, **request.options):
                    request.put(step)
                    if request.canceled.is_set():
                        break
            if self._closed and request.canceled.is_set():
                raise closed()
        except Exception as error:  # whatever it is, it is the reader's
            end = error
        with suppress(RuntimeError):  # its loop of asyncio has ended, and no one reads it
            request.put(end)


def closed() -> Closed:
    return Closed(STAGE, "the pool is closed", "make another")


def _step(item: Item) -> Step | None:
    if isinstance(item, Exception):
        raise item
    return item
