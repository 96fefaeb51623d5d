"""What a token takes in each runtime where a decode writes it by ScatterElements, and where by Where.

    python -m tests.export.ship.cache_writes BUNDLE FOLDER [--turns N] [--for NAME ...]

ships a portable bundle into the folder for every runtime in both forms, runs golden.json through both by
turns and prints a table of medians. A form whose texts are not PyTorch's says so.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import statistics
import sys
from pathlib import Path
from typing import get_args

from stillgraph.cpu import cpu_name
from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship.check import check
from stillgraph.exporter.ship.runtimes import Runtime, runtimes
from stillgraph.exporter.ship.ship import ship
from stillgraph.exporter.targets import CacheWrite

FORMS: tuple[CacheWrite, ...] = get_args(CacheWrite)
HEAD = ["runtime", *(f"{form}, ms" for form in FORMS), f"{FORMS[-1]} / {FORMS[0]}"]


def row(bundle: Path, folder: Path, runtime: Runtime, turns: int) -> list[str] | None:
    """Medians of TPOT in each form, and of their ratios in a turn; None where it cannot run here."""
    ready, told = dict[CacheWrite, Path](), dict[CacheWrite, str]()
    for form in FORMS:
        one = copy.copy(runtime)
        one.cache_write = form
        try:
            shipped = ship(bundle, one, folder / f"{runtime.name}-{form}", _say)
        except StillgraphError as error:
            told[form] = "another text" if "differs from golden.json" in str(error) else "none"
            _say(str(error))
            continue
        if shipped.checked.reason or shipped.checked.tpot_ms is None:
            return None
        ready[form] = shipped.folder
    times = {form: list[float]() for form in ready}
    for _ in range(turns):
        for form, place in ready.items():
            times[form].append(check(runtime, place).tpot_ms or 0.0)
    cells = [f"{statistics.median(times[form]):.3g}" if form in times else told[form] for form in FORMS]
    if len(times) < len(FORMS):
        return [runtime.title, *cells, ""]
    first, last = (times[form] for form in FORMS)
    return [
        runtime.title,
        *cells,
        f"{statistics.median(b / a for a, b in zip(first, last, strict=True)):.2f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--for", dest="names", nargs="+", choices=sorted(runtimes()), default=None)
    args = parser.parse_args()
    lines = [HEAD, ["---"] * len(HEAD)]
    for name in args.names or sorted(runtimes()):
        _say(name)
        runtime = runtimes()[name]
        if found := row(args.bundle, args.folder, runtime, args.turns):
            lines.append(found)
    print(f"{datetime.datetime.now(datetime.UTC).date()}, {cpu_name()}.\n")
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
