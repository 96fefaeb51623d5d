"""KeyboardInterrupt at a chosen instant of a call: where CPython would raise it for a signal that came then.

In the files that keep an engine's state. Other files' instants are those of the calls into them.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

from stillgraph import dynamic, engine, kv_cache, turn
from stillgraph.vision import embedder, features

KEEPS_STATE = (dynamic, engine, kv_cache, turn, contextlib, embedder, features)
FILES = {module.__file__ for module in KEEPS_STATE}
# CPython looks for signals behind these, and nowhere else.
HANDLES_SIGNALS = ("CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD", "RESUME", "SEND")


@cache
def instants(code: CodeType) -> frozenset[int]:
    """Offsets of the bytecodes of a function before which a signal is handled."""
    found, before = set[int](), ""
    for instruction in dis.get_instructions(code):
        if before.startswith(HANDLES_SIGNALS):
            found.add(instruction.offset)
        before = instruction.opname
    return frozenset(found)


def run(call: Callable[[], Any], at: int | None = None) -> list[tuple[CodeType, int]]:
    """Call, interrupted at the instant of that number; the instants that came until then."""
    passed: list[tuple[CodeType, int]] = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in FILES:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and frame.f_lasti in instants(code):
            passed.append((code, frame.f_lasti))
            if len(passed) - 1 == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert at is not None
    finally:
        sys.settrace(before)
    return passed


def interruptions(call: Callable[[], Any]) -> Iterator[str]:
    """Interrupt at every instant, the first and the last time that it comes; says where it was.

    After each, the caller looks whether all is well. A call must do the same each time.
    """
    passed = run(call)
    last = {instant: number for number, instant in enumerate(passed)}
    first = {instant: number for number, instant in reversed(list(enumerate(passed)))}
    assert len(last) > 20
    for number in sorted({*first.values(), *last.values()}):
        code, offset = run(call, number)[-1]
        yield f"{code.co_qualname} at bytecode {offset}, number {number} of {len(passed)}"
