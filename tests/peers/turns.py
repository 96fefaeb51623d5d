"""One contender's turn: a fresh process, while nothing else runs on the machine if that can be had."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protocol import Request, busy_seconds

ROOT = Path(__file__).parent.parent.parent
DISTURBED = 0.1  # cores that others used: above it, spinning threads of a contender wait for each other
TRIES = 3
TIMEOUT_S = 600  # of one turn; a swapping machine is a result too


@dataclass(frozen=True)
class Entry:
    """A contender in the table. skipped: why it cannot take part, or None."""

    name: str
    python: Path
    script: Path
    request: Request
    skipped: str | None = None


def wait_for_quiet(patience: float) -> None:
    """Until others use less than DISTURBED cores for a second, `patience` seconds at most."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < DISTURBED:
            return


def take_turn(entry: Entry, patience: float) -> dict[str, Any]:
    """The row of the quietest of a few tries, as soon as one was undisturbed; or {"error": a sentence}."""
    rows: list[dict[str, Any]] = []
    for _ in range(TRIES if patience else 1):
        wait_for_quiet(patience)
        row = run_once(entry)
        if "error" in row:
            return row
        rows.append(row)
        if row["other_cores"] < DISTURBED:
            break
    return min(rows, key=lambda row: row["other_cores"])


def run_once(entry: Entry) -> dict[str, Any]:
    command = [str(entry.python), str(entry.script), json.dumps(asdict(entry.request))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if entry.script.name == "ours.py":
        environment["PYTHONPATH"] = str(ROOT)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT_S} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"error": f"exit {done.returncode}: {lines[-1][:200]}"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row
