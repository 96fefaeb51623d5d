"""Four processes over one bundle at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stillgraph.metrics import pss_mb
from tests.faults.batch import ROOT, environment
from tests.faults.outcome import Outcome, Trial
from tests.faults.subjects import PROMPTS, answer, expected, open_

PROCESSES = 4


def four(seed: int, scratch: Path) -> Trial:
    right = expected("int4", "compiled")

    def trial(number: int) -> Outcome:
        """All answer, then all are asked how large they are while all are there."""
        command = [sys.executable, "-m", "tests.faults.processes"]
        pipe = subprocess.PIPE
        started = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment())
            for _ in range(PROCESSES)
        ]
        answers = [json.loads(process.stdout.readline() or "null") for process in started]
        for process in started:
            process.stdin.write("\n")
            process.stdin.flush()
        sizes = [process.stdout.readline().strip() for process in started]
        for process in started:
            process.communicate("\n")
        if any(process.returncode for process in started):
            return Outcome("raw", f"exit codes {[process.returncode for process in started]}")
        if any(found != right for found in answers):
            return Outcome("wrong", f"trial {number}: {answers}")
        return Outcome("right", f"note PSS {', '.join(sizes)} MB")

    return trial


def _one() -> None:
    with open_("int4") as engine:
        print(json.dumps([answer(engine, index) for index in range(len(PROMPTS) + 1)]), flush=True)
        sys.stdin.readline()
        print(f"{pss_mb():.0f}", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    _one()
