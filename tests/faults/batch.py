"""Trials in a process of their own, which may die or never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.faults.outcome import Outcome, Tally

ROOT = Path(__file__).parents[2]
STARTS = 120.0  # seconds until the first outcome, in which bundles are loaded and libraries imported


def run(name: str, seed: int, count: int, limit: float = 60.0) -> Tally:
    """`count` trials of a name of `worker.TRIALS`. limit: seconds that one may take.

    A process that dies or hangs costs the trial that it was in; another goes on behind that.
    """
    tally, done = Tally(name), 0
    while done < count:
        for found in _process(name, seed, done, count, limit):
            tally.add(found)
            tally.note = found.what if found.what.startswith("note ") else tally.note
            done += 1
    tally.note = tally.note.removeprefix("note ")
    return tally


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _process(name: str, seed: int, first: int, end: int, limit: float) -> Iterator[Outcome]:
    command = [sys.executable, "-m", "tests.faults.worker", name, str(seed), str(first), str(end)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, env=environment()
        ) as process,
    ):
        assert process.stdout is not None
        done, late = first, threading.Event()
        while done < end:
            timer = threading.Timer(STARTS if done == first else limit, _end, (process, late))
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            yield Outcome(*json.loads(line))
            done += 1
        process.wait()
        if done < end:
            said.seek(0, os.SEEK_END)
            said.seek(max(0, said.tell() - 300))
            how = "never ended" if late.is_set() else f"the process ended with {process.returncode}"
            last = " ".join(said.read().decode(errors="replace").split())
            yield Outcome("raw", f"trial {done}: {how}: {last}")


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()
