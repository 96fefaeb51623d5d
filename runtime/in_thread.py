"""A generator that runs in threads, for a loop of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_thread(begin: Callable[[], Generator[T]]) -> AsyncGenerator[T]:
    """What the generator of `begin` yields, with `begin` and each step called in a thread.

    A thread cannot be stopped: closed or canceled, this waits for the step that is running and closes the
    generator then.
    """
    steps = await _in_thread(begin)
    try:
        while (step := await _in_thread(lambda: _next(steps))) is not None:
            yield step[0]
    finally:
        steps.close()


def _next(steps: Generator[T]) -> tuple[T] | None:
    """The next step, or None: StopIteration cannot leave a thread."""
    for step in steps:
        return (step,)
    return None


async def _in_thread(call: Callable[[], T]) -> T:
    """The call's result. Canceled, this raises only when the call has ended.

    Not asyncio.to_thread: what that starts is canceled where a loop ends, and then nothing tells when the
    thread is done.
    """
    running = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()  # else asyncio complains that nobody asked for it
        raise
