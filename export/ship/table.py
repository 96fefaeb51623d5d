"""The demo through every runtime: which texts are PyTorch's, and what they take.

    python -m stillgraph.exporter.ship.table FOLDER

exports the demo into the folder in four precisions, ships each for every runtime, and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from stillgraph.cpu import cpu_name
from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship.check import Checked
from stillgraph.exporter.ship.runtimes import Runtime, runtimes
from stillgraph.exporter.ship.ship import ship
from stillgraph.manifest import Precision, read

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
HEAD = "runtime | lines | precision | texts equal | largest error | TTFT, ms | TPOT, ms | peak RSS, MB".split(
    "|"
)
SOURCES = {".py", ".js", ".mjs", ".cpp", ".hpp", ".html", ".css"}


def rows(folder: Path) -> Iterator[list[str]]:
    """Cells of each runtime and precision."""
    for precision in PRECISIONS:
        bundle = folder / precision
        if not (bundle / "golden.json").is_file():
            options = ["--out", str(bundle), "--precision", precision]
            subprocess.run(
                [sys.executable, "-m", "stillgraph", "export", "bundle", *options], check=True, stdout=2
            )
        for name, runtime in sorted(runtimes().items()):
            _say(f"{precision} for {name}")
            told = [f"{_lines(runtime)}", precision]
            if reason := runtime.refuses(read(bundle)):
                yield [runtime.title, *told, f"refused: {reason}", *[""] * 4]
                continue
            try:
                checked = ship(bundle, runtime, folder / f"{precision}-{name}", _say).checked
            except StillgraphError as error:
                yield [runtime.title, *told, f"none: {error}", *[""] * 4]
            else:
                versions = ", ".join(
                    sorted({version.partition("-")[0] for version in checked.versions.values()})
                )
                yield [f"{runtime.title} {versions}", *told, *_cells(checked)]


def markdown(found: list[list[str]]) -> str:
    date = datetime.datetime.now(datetime.UTC).date()
    lines = [HEAD, ["---"] * len(HEAD), *found]
    table = "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)
    return f"{date}, {cpu_name()}.\n\n{table}\n"


def _cells(checked: Checked) -> list[str]:
    if checked.reason:
        return [f"not run: {checked.reason}", *[""] * 4]
    equal = f"{checked.equal} of {checked.cases}"
    equal += f", {checked.near_ties} to a near tie" if checked.near_ties else ""
    figures = (checked.ttft_ms, checked.tpot_ms, checked.peak_rss_mb)
    return [equal, f"{checked.worst:.1e}", *("" if value is None else f"{value:.3g}" for value in figures)]


def _lines(runtime: Runtime) -> int:
    """Of the driver's source that are not empty."""
    files = [path for path in runtime.driver_files() if path.suffix in SOURCES]
    return sum(bool(line.strip()) for path in files for line in path.read_text(encoding="utf-8").splitlines())


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(markdown(list(rows(parser.parse_args().folder))))


if __name__ == "__main__":
    main()
