"""The C++ driver beside our Python, for three jobs: a growing cache, static graphs, a picture in the prompt.

    python -m tests.export.ship.side_by_side FOLDER [--turns N] [--static BUNDLE]

exports the demo for each job into the folder and gives each process in turn the longest prompt of golden.json
that some tokens follow, or the one with a picture. It prints a table of medians.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillgraph.cpu import cpu_name
from stillgraph.exporter.ship.cpp import RUNTIME as OPENVINO
from stillgraph.exporter.ship.cpp_onnxruntime import RUNTIME as ONNXRUNTIME
from stillgraph.exporter.ship.runtimes import Runtime
from stillgraph.golden import GOLDEN, Case, read
from stillgraph.manifest import read as read_manifest

JOBS = {
    "growing cache": ["export", "dynamic"],
    "static graphs": ["export", "bundle"],
    "a picture": ["export", "bundle", "-m", "demo-vision"],
}
PYTHON, ALONE = "Python, ONNX Runtime", ", one graph at a time"
FIGURES = {"TTFT, ms": "ttft_ms", "TPOT, ms": "tpot_ms", "peak PSS, MB": "peak_pss_mb"}
HEAD = ["job", "program", "tokens equal", *FIGURES, "TPOT ratio", "PSS ratio"]
Line = dict[str, Any]


def bundles(folder: Path, static: Path | None) -> dict[str, Path]:
    """A bundle with golden.json for each job."""
    found = {job: folder / job.replace(" ", "-") for job in JOBS}
    for job, words in JOBS.items():
        for command in ([*words, "--out"], ["validate", "--quick"]):  # a growing graph is exported without
            if not (found[job] / GOLDEN).is_file():
                own = [sys.executable, "-m", "stillgraph"]
                subprocess.run([*own, *command, str(found[job])], check=True, stdout=sys.stderr)
    return found | ({"static graphs": static} if static else {})


def programs(bundle: Path, case: Case) -> dict[str, list[str]]:
    """What prints a line of JSON for a case, by its title."""
    own = [sys.executable, "-m", __spec__.name, str(bundle), "--case", case.name]
    found, target = {PYTHON: own}, read_manifest(bundle).target
    for runtime in (ONNXRUNTIME, OPENVINO):
        if target in runtime.targets and not runtime.missing():
            given = bundle if runtime.refuses(read_manifest(bundle)) else _shipped(bundle, runtime)
            words = [str(given), "--golden", str(given / GOLDEN), "--case", case.name]
            found[runtime.title] = [str(runtime.program()), *words]
    return found


def _shipped(bundle: Path, runtime: Runtime) -> Path:
    """As the runtime is given it; a growing graph is not shipped, and given as it is."""
    from stillgraph.exporter.ship.ship import ship  # here: our Python is measured in a process of this module

    place = bundle.with_name(f"{bundle.name}-{runtime.name}")
    if not place.is_dir():
        ship(bundle, runtime, place, lambda line: print(line, file=sys.stderr))
    return place


def chosen(bundle: Path) -> Case:
    cases = read(bundle).cases
    seen = [case for case in cases if case.picture_png] or cases
    return max(seen, key=lambda case: (len(case.tokens) > 8, len(case.prompt)))


def measured(command: Sequence[str], unload: bool) -> Line:
    environment = os.environ | {"UNLOAD_PREFILL_BEFORE_DECODE": str(int(unload))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    line: Line = json.loads(done.stdout.splitlines()[-1])
    return line


def answer(bundle: Path, name: str) -> Line:
    """Our Python's, in this process."""
    from PIL import Image

    from stillgraph.loading import load
    from stillgraph.metrics import PeakPss, Times

    (case,) = (case for case in read(bundle).cases if case.name == name)
    pictures = [Image.open(io.BytesIO(base64.b64decode(case.picture_png)))] if case.picture_png else []
    with PeakPss() as peak, load(bundle) as engine:
        peak.sample()
        steps = list(engine.stream(case.prompt, images=pictures, max_new_tokens=case.max_new_tokens))
        peak.sample()
    times = Times.of(steps)
    made = {"tokens": [step.token for step in steps], "peak_pss_mb": peak.mb}
    return made | {"ttft_ms": times.ttft_ms, "tpot_ms": times.tpot_ms}


def rows(job: str, bundle: Path, turns: int) -> list[list[str]]:
    case = chosen(bundle)
    found: dict[str, list[Line]] = {}
    for unload in (False, True) if job == "static graphs" else (False,):
        for _ in range(turns):
            for title, command in programs(bundle, case).items():
                key = title + ALONE if unload else title
                found.setdefault(key, []).append(measured(command, unload))
    return [_cells(job, title, lines, found, case) for title, lines in found.items()]


def _cells(job: str, title: str, lines: list[Line], found: dict[str, list[Line]], case: Case) -> list[str]:
    """Ratios are to Python's in the same turn, medians of them."""
    own = found[PYTHON + ALONE if title.endswith(ALONE) else PYTHON]
    equal = sum(a == b for a, b in zip(lines[0]["tokens"], case.tokens, strict=False))

    def ratio(name: str) -> str:
        return f"{statistics.median(a[name] / b[name] for a, b in zip(lines, own, strict=True)):.2f}"

    medians = [f"{statistics.median(line[name] for line in lines):.3g}" for name in FIGURES.values()]
    return [job, title, f"{equal} of {len(case.tokens)}", *medians, ratio("tpot_ms"), ratio("peak_pss_mb")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--static", type=Path, help="a bundle in place of the demo's static graphs")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of our Python, in a process of its own
    given = parser.parse_args()
    if given.case:
        print(json.dumps(answer(given.folder, given.case)))
        return
    table = [HEAD, ["---"] * len(HEAD)]
    for job, bundle in bundles(given.folder, given.static).items():
        table += rows(job, bundle, given.turns)
    lines = "\n".join(f"| {' | '.join(line)} |" for line in table)
    date = datetime.datetime.now(datetime.UTC).date()
    print(f"{date}, {cpu_name()}, {given.turns} turns.\n\n{lines}")


if __name__ == "__main__":
    main()
