"""One contender's turn: a fresh process, while nothing else runs on the machine if possible."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from stillgraph.exporter.bench.contender import Contender
from stillgraph.exporter.bench.report import MemoryTrace, Run
from stillgraph.exporter.bench.worker import Request, busy_seconds
from stillgraph.metrics import pss_mb

HARNESS = Path(__file__).with_name("worker.py")
DISTURBED = 0.1  # cores that others used: above it, spinning threads of a contender wait for each other
TRIES = 3
TIMEOUT_S = 1800  # of one turn; a swapping machine is a result too
SAMPLE_S = 0.05


class TurnFailed(Exception):
    """Why a contender has no row, in a few words."""


class Turn:
    """What one process reported: its run, facts about it, and the memory seen from outside."""

    def __init__(self, row: dict[str, Any], turn: int, memory: MemoryTrace | None) -> None:
        self.facts, self.memory = row.pop("facts"), memory
        del row["marks"]
        self.run = Run(turn=turn, **row)


def take_turn(contender: Contender, request: Request, turn: int, patience: float) -> Turn:
    """The quietest of a few tries, stopping at the first that was undisturbed. Raises TurnFailed.

    Turn 0 is not counted: it warms the file cache, and its memory is sampled, which costs time.
    """
    if turn == 0:
        return run_once(contender, request, turn, sample=True)
    tries: list[Turn] = []
    for _ in range(TRIES if patience else 1):
        wait_for_quiet(patience)
        tries.append(run_once(contender, request, turn))
        if tries[-1].run.other_cores < DISTURBED:
            break
    return min(tries, key=lambda found: found.run.other_cores)


def wait_for_quiet(patience: float) -> None:
    """Until others use less than DISTURBED cores for a second, `patience` seconds at most."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < DISTURBED:
            return


def run_once(contender: Contender, request: Request, turn: int, sample: bool = False) -> Turn:
    began, row, samples = launch(contender, request, sample)
    if not sample:
        return Turn(row, turn, None)
    marks = tuple((1e3 * (at - began), what) for at, what in row["marks"])
    return Turn(row, turn, MemoryTrace(samples=tuple(samples), marks=marks) if samples else None)


def launch(
    contender: Contender, request: Request, sample: bool = False
) -> tuple[float, dict[str, Any], list[tuple[float, float]]]:
    """When a process began, the row it printed, and its memory if asked. Raises TurnFailed."""
    command = [str(contender.python), str(HARNESS), str(contender.file), json.dumps(asdict(request))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as complaints:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=complaints, env=environment)
        try:
            samples = watch(process, began, sample)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise TurnFailed(_why(process.returncode, _lines(complaints)))
        lines = _lines(out)
    try:
        row: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        raise TurnFailed("it printed no result") from None
    return began, row, samples


def watch(process: subprocess.Popen[Any], began: float, sample: bool) -> list[tuple[float, float]]:
    """Wait for the end; the PSS of the process meanwhile, as (ms, MB). Raises TurnFailed at TIMEOUT_S."""
    samples: list[tuple[float, float]] = []
    while True:
        try:
            process.wait(SAMPLE_S if sample else TIMEOUT_S)
            return samples
        except subprocess.TimeoutExpired:
            if time.monotonic() - began > TIMEOUT_S:
                raise TurnFailed(f"it was not done after {TIMEOUT_S} s") from None
        if (pss := pss_mb(process.pid)) is not None:
            samples.append((1e3 * (time.monotonic() - began), pss))


def _lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return [line for line in file.read().splitlines() if line.strip()]


def _why(code: int, complaints: list[str]) -> str:
    if code == -signal.SIGKILL:
        return "it was killed, as a system does that runs out of memory"
    last = complaints[-1].strip()[:200] if complaints else "it said nothing"
    name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"it ended with {name}: {last}"
