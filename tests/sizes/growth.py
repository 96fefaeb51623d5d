"""What an export takes as a model grows: memory, disk and time of Gemma 3 4B's geometry over its layers.

    python -m tests.sizes.growth FOLDER [--layers 2,8,17,34] [--precisions int4,fp16]

Each export is a process of its own. Printed, and kept in README.md as a table and a chart. FOLDER holds a
checkpoint and a bundle at a time: 11 GB for int4 of 34 layers, 17 GB for fp16.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import astuple, dataclass
from math import ceil
from pathlib import Path

from stillgraph.cpu import cpu_name
from tests.page import keep, table
from tests.sizes import geometry

PAGE = Path(__file__).with_name("README.md")
EVERY = 0.05  # seconds between two looks at a process
KIB = 1024 / 1e9
COLUMNS = (
    "layers", "precision", "checkpoint GB", "bundle GB", "peak private GB", "peak resident GB", "seconds",
)  # fmt: skip
START, END = "<!-- growth -->\n", "<!-- end of growth -->\n"

COLORS = {"blue": "#3b78e7", "orange": "#e8710a"}
CHART = """```mermaid
---
config:
    themeVariables:
        xyChart:
            plotColorPalette: "{palette}"
---
xychart-beta
    title "{title}"
    x-axis [{layers}]
    y-axis 0 --> {end}
{lines}
```"""


@dataclass(frozen=True)
class Grown:
    """GB and seconds of one export. private: peak of memory that is no file's; resident: with mapped files,
    which the system takes back when it needs to."""

    layers: int
    precision: str
    checkpoint: float
    bundle: float
    private: float
    resident: float
    seconds: float


def export(checkpoint: Path, precision: str, layers: int, out: Path) -> Grown:
    command = [sys.executable, "-m", "stillgraph", "export", "bundle", "--model", str(checkpoint)]
    command += ["--precision", precision, "--out", str(out), "--no-validate", "--quiet"]
    if precision == "int4":
        command += ["--calibrate", "none"]  # memory is the question here, and the weights are random
    began, private, resident = time.monotonic(), 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            now = _memory(process.pid)
            private, resident = max(private, now[0]), max(resident, now[1])
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.monotonic() - began
    return Grown(layers, precision, _size(checkpoint), _size(out), private, resident, seconds)


def _memory(pid: int) -> tuple[float, float]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {name: int(rest.split()[0]) * KIB for name, _, rest in (line.partition(":") for line in lines)
             if name.startswith(("VmRSS", "RssAnon", "RssShmem"))}  # fmt: skip
    return sizes.get("RssAnon", 0.0) + sizes.get("RssShmem", 0.0), sizes.get("VmRSS", 0.0)


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def render(rows: list[Grown]) -> str:
    cells = [
        (
            str(row.layers),
            row.precision,
            *(f"{value:.2f}" for value in astuple(row)[2:-1]),
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    return f"{table(COLUMNS, cells)}\n\nOn 2 cores of {cpu_name()}.\n\n{_chart(rows)}\n"


def _chart(rows: list[Grown]) -> str:
    """Lines of a Mermaid chart have no legend, so its title names their colors."""
    layers = sorted({row.layers for row in rows})
    precisions = sorted({row.precision for row in rows})
    series = [[row.private for row in rows if row.precision == name] for name in precisions]
    named = ", ".join(f"{name} {color}" for name, color in zip(precisions, COLORS, strict=False))
    lines = [f"    line [{', '.join(f'{value:.2f}' for value in values)}]" for values in series]
    return CHART.format(
        palette=", ".join(COLORS.values()),
        title=f"Peak of private memory, GB, over layers: {named}",
        layers=", ".join(map(str, layers)),
        end=ceil(max(map(max, series))),
        lines="\n".join(lines),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", default="2,8,17,34")
    parser.add_argument("--precisions", default="int4,fp16")
    given = parser.parse_args()
    rows = list[Grown]()
    for layers in map(int, given.layers.split(",")):
        checkpoint = geometry.write(given.folder / f"checkpoint-{layers}", geometry.gemma_4b(layers))
        for precision in given.precisions.split(","):
            out = given.folder / "bundle"
            shutil.rmtree(out, ignore_errors=True)
            rows.append(export(checkpoint, precision, layers, out))
            print(rows[-1], flush=True)
            shutil.rmtree(out)
        shutil.rmtree(checkpoint)
    rows.sort(key=lambda row: (row.precision, row.layers))
    keep(PAGE, START, END, render(rows))
    print(render(rows))


if __name__ == "__main__":
    main()
