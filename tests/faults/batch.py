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
SCRATCH = ROOT / "artifacts" / "faults"  # on the bundles' file system, for hard links


def run(name: str, seed: int, count: int, limit: float = 60.0) -> Tally:
    """`count` trials of a name of `worker.TRIALS`. limit: seconds that one may take, the first twice as many.

    A process that dies or hangs costs the trial that it was in; another goes on behind that.
    """
    tally, done = Tally(name), 0
    while done < count:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
            for found in _process([name, str(seed), str(done), str(count), scratch], count - done, limit):
                tally.add(found)
                tally.note = found.what if found.what.startswith("note ") else tally.note
                done += 1
    tally.note = tally.note.removeprefix("note ")
    return tally


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def _process(arguments: list[str], count: int, limit: float) -> Iterator[Outcome]:
    command = [sys.executable, "-m", "tests.faults.worker", *arguments]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT, env=environment()
        ) as process,
    ):
        assert process.stdout is not None
        done, late = 0, threading.Event()
        while done < count:
            timer = threading.Timer(limit if done else 2 * limit, _end, (process, late))
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            yield Outcome(*json.loads(line))
            done += 1
        process.wait()
        if done < count:
            said.seek(0, os.SEEK_END)
            said.seek(max(0, said.tell() - 300))
            how = "never ended" if late.is_set() else f"the process ended with {process.returncode}"
            last = " ".join(said.read().decode(errors="replace").split())
            yield Outcome("raw", f"trial {int(arguments[2]) + done}: {how}: {last}")


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()
