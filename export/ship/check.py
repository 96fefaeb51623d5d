"""Run golden.json through a shipped folder's driver, in a process of its own, and compare."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from pydantic import Field

from stillgraph.errors import CheckFailed
from stillgraph.exporter.ship.environments import variables
from stillgraph.exporter.ship.runtimes import STAGE, Runtime
from stillgraph.golden import GOLDEN, Answer, Compared, compare, read
from stillgraph.spec import Frozen

PATIENCE = 900  # seconds for all cases
REMEDY = "report this bug, with the runtime's version"


class Checked(Frozen):
    """What came of golden.json. reason: why it was not run, then all else is empty.

    equal: cases without a problem, of `cases`; skipped: those of `cases` that the driver says it cannot run,
    and why; near_ties: those of the equal that end early, at one; worst: the largest error of a logit, in
    terms of the tolerance's; ttft_ms, tpot_ms: of the case of the longest text that has a few tokens, prompt:
    its tokens.
    """

    reason: str | None = None
    cases: int = 0
    equal: int = 0
    near_ties: int = 0
    worst: float = 0.0
    prompt: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    peak_rss_mb: float | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def check(runtime: Runtime, folder: Path) -> Checked:
    """Raises CheckFailed for a driver that dies or does not answer each case; a wrong answer is a problem."""
    command = runtime.command(folder)
    if isinstance(command, str):
        return Checked(reason=command)
    golden = read(folder)
    tolerance = runtime.tolerance or golden.tolerance
    answers = {str(answer.get("name")): answer for answer in _run([*command, "--golden", GOLDEN], folder)}
    compared, told, skipped = list[Compared](), list[str](), list[str]()
    for case in golden.cases:
        if case.name not in answers:
            raise CheckFailed(STAGE, f"the {runtime.title} driver gave no answer to {case.name}", REMEDY)
        if why := answers[case.name].get("skipped"):
            skipped.append(f"{case.name}: {why}")
            continue
        found = compare(case, answer_of(answers[case.name]), tolerance)
        told += [f"{case.name}: {problem}" for problem in found.problems]
        if not found.steps and not found.problems:
            told.append(f"{case.name}: no logits were given")
        compared.append(found)
    if not compared:
        return Checked(reason=f"every case was skipped ({skipped[0]})")
    run = [case for case in golden.cases if not answers[case.name].get("skipped")]
    timed = max(run, key=lambda case: (len(case.tokens) > 8, len(case.prompt)))
    measured = {name: answers[timed.name].get(name) for name in ("ttft_ms", "tpot_ms")}
    peaks = [answer["peak_rss_mb"] for answer in answers.values() if answer.get("peak_rss_mb")]
    return Checked(
        cases=len(golden.cases),
        equal=sum(not found.problems for found in compared),
        near_ties=sum(found.near_tie is not None for found in compared),
        worst=max((found.worst for found in compared), default=0.0),
        prompt=len(timed.prompt),
        peak_rss_mb=max(peaks, default=None),
        versions=answers[timed.name].get("versions", {}),
        skipped=tuple(skipped),
        problems=tuple(told),
        **measured,
    )


def answer_of(raw: dict[str, Any]) -> Answer:
    logits = {one["step"]: dict(zip(one["ids"], one["values"], strict=True)) for one in raw["logits"]}
    return Answer(tuple(raw["tokens"]), raw["finish_reason"], logits)


def _run(command: list[str], folder: Path) -> list[dict[str, Any]]:
    environment = variables() | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckFailed(STAGE, f"the driver did not run ({error})", REMEDY) from error
    lines = done.stdout.splitlines()
    try:
        answers = [json.loads(line) for line in lines if line.startswith("{")]
    except ValueError as error:
        raise CheckFailed(STAGE, f"the driver's answer is not JSON ({error})", REMEDY) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckFailed(STAGE, f"the driver ended with {done.returncode} ({last:.300})", REMEDY)
    return answers
