"""kill -9 of a command that writes, at a random instant; the bundle is whole, and the next command clean."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

from stillgraph import load
from stillgraph.files import check_files
from stillgraph.manifest import read
from tests.faults.outcome import Outcome, Trial
from tests.faults.subjects import FOLDER, answer, expected, tokens

SHORT = 2  # a prompt
AGAIN = 5  # of so many kills one is followed by the same command to its end, which takes longest


def export(seed: int, scratch: Path) -> Trial:
    arguments = ["export", "decode", "--precision", "int4", "--target", "onnxruntime", "--out"]
    return _trial(arguments, seed, scratch)


def validate(seed: int, scratch: Path) -> Trial:
    return _trial(["validate", "--quick"], seed, scratch)


def compile_(seed: int, scratch: Path) -> Trial:
    return _trial(["compile"], seed, scratch)


def _trial(arguments: list[str], seed: int, scratch: Path) -> Trial:
    """Of one bundle, killed again and again: what one kill leaves, the next command finds."""
    place = scratch / "beside" / "bundle"
    shutil.copytree(FOLDER / "int4", place)
    command = [*arguments, str(place)]
    _import()
    began = time.monotonic()
    if code := _forked(lambda: _command(command)):
        raise RuntimeError(f"{command} ended with {code}")
    length = time.monotonic() - began

    def trial(number: int) -> Outcome:
        seconds = Random(f"{seed} {arguments[0]} {number}").uniform(0, length)
        code = _forked(lambda: _command(command), seconds)
        what = f"trial {number}, {arguments[0]} killed after {seconds:.2f} of {length:.2f} s"
        if code not in (0, -signal.SIGKILL):
            return Outcome("raw", f"{what}: it ended with {code}")
        if code := _forked(lambda: _wrong(place)):
            return Outcome("wrong" if code == 3 else "raw", f"{what}: the bundle, {code}")
        if number % AGAIN:
            return Outcome("right", what)
        if code := _forked(lambda: _command(command)):
            return Outcome("raw", f"{what}: the next command ended with {code}")
        if left := sorted(path.name for path in scratch.rglob(".*")):
            return Outcome("raw", f"{what}: the next command left {left}")
        code = _forked(lambda: _wrong(place))
        return Outcome("wrong" if code else "right", what)

    return trial


def _forked(call: object, seconds: float | None = None) -> int:
    """What a process that calls ends with: as if it had been started, but that libraries are there already.

    seconds: after which it is killed.
    """
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = call()  # type: ignore[operator]
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _command(arguments: list[str]) -> int:
    from stillgraph.cli import main

    return main(arguments)


def _wrong(bundle: Path) -> int:
    check_files(bundle, read(bundle), hashes=True)
    with load(bundle, threads=1) as engine:
        found = tokens(answer(engine, SHORT))
    kinds = ("compiled", "plain")
    return 0 if any(found == tokens(expected("int4", kind)[SHORT]) for kind in kinds) else 3


def _import() -> None:
    """What the commands import, and takes them seconds."""
    from stillgraph.exporter import api, commands  # noqa: F401
    from stillgraph.exporter.compile import compile as _compile  # noqa: F401
