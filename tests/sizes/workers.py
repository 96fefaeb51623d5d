"""What several processes over one bundle take: the weights file is mapped, and in memory once for all.

    python -m tests.sizes.workers BUNDLE [--counts 1,4,8]

Every process loads the bundle and makes 32 tokens; then all are looked at while all are alive. Printed, and
kept in README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillgraph.cpu import cpu_name
from stillgraph.manifest import read
from tests.page import keep, table

PAGE = Path(__file__).with_name("README.md")
START, END = "<!-- workers -->\n", "<!-- end of workers -->\n"
COLUMNS = "processes", "PSS MB of all", "PSS MB of each", "private MB of each", "RSS MB of each"
WORKER = """
import json, sys
from pathlib import Path
from stillgraph import load
with load(sys.argv[1], threads=1) as engine:
    list(engine.stream([2, 3, 4], max_new_tokens=32, stop_tokens=()))
    print("ready", flush=True)
    sys.stdin.readline()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    print(json.dumps(sizes), flush=True)
    sys.stdin.readline()
"""


def measured(bundle: Path, count: int) -> list[dict[str, float]]:
    """Of each process, MB by the names of Linux's smaps_rollup."""
    command = [sys.executable, "-c", WORKER, str(bundle)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for worker in workers:
        _answer(worker)
    found = []
    for worker in workers:
        _go_on(worker)
        found.append(json.loads(_answer(worker)))
    for worker in workers:
        _go_on(worker)
        worker.wait()
    return found


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline()


def _go_on(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def row(found: list[dict[str, Any]]) -> tuple[str, ...]:
    count, pss = len(found), sum(one["Pss"] for one in found)
    private = sum(one["Private_Clean"] + one["Private_Dirty"] for one in found) / count
    resident = sum(one["Rss"] for one in found) / count
    return tuple(f"{value:.0f}" for value in (count, pss, pss / count, private, resident))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--counts", default="1,4,8")
    given = parser.parse_args()
    manifest = read(given.bundle)
    rows = [row(measured(given.bundle, count)) for count in map(int, given.counts.split(","))]
    weights = f"{manifest.weights.file.nbytes / 1e6:.0f} MB of weights at {manifest.precision}"
    text = f"{table(COLUMNS, rows)}\n\n{weights}, on 2 cores of {cpu_name()}.\n"
    keep(PAGE, START, END, text)
    print(text)


if __name__ == "__main__":
    main()
