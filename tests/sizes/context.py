"""What a longer context costs: time of a token and memory of Gemma 3 270M's geometry over the cache's length.

    python -m tests.sizes.context FOLDER [--ctx 1024,4096,16384,32768]

A token is timed behind a prompt of 128 tokens and where the cache is nearly full, each bundle in a process of
its own. The portable target attends over all slots at any position, so there a long cache is not filled: each
chunk of 128 tokens would take as long as the first. Printed, and kept in README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from stillgraph.cpu import cpu_name
from tests.page import keep, table
from tests.sizes import geometry

PAGE = Path(__file__).with_name("README.md")
START, END = "<!-- context -->\n", "<!-- end of context -->\n"
COLUMNS = (
    "target", "ctx", "TPOT ms behind 128 tokens", "TPOT ms in a full cache", "TTFT ms of 128 tokens",
    "TTFT s of a full cache", "PSS MB",
)  # fmt: skip
TOKENS = 128, 32  # of the short prompt, and behind each
FILLED = {"onnxruntime": 1 << 20, "portable": 4096}  # slots of the longest cache that is filled
RUN = """
import json, sys
from random import Random
from stillgraph import load
from stillgraph.metrics import Times, pss_mb
bundle, lengths = sys.argv[1], map(int, sys.argv[2:])
found = {}
with load(bundle, threads=2) as engine:
    for turn, length in enumerate(lengths):  # another prompt each time: what the cache knows is not computed
        ids = [2, *(Random(turn).randrange(1000, 200000) for _ in range(length - 1))]
        times = Times.of(list(engine.stream(ids, max_new_tokens=32, stop_tokens=())))
        found[length] = {"ttft": times.ttft_ms, "tpot": times.tpot_ms, "pss": pss_mb()}
print(json.dumps(found))
"""


def measured(checkpoint: Path, folder: Path, target: str, ctx: int) -> list[dict[str, Any]]:
    out = folder / f"{target}-{ctx}"
    if not (out / "manifest.json").is_file():
        command = [sys.executable, "-m", "stillgraph", "export", "bundle", "--model", str(checkpoint)]
        command += ["--precision", "int4", "--calibrate", "none", "--target", target, "--ctx", str(ctx)]
        command += ["--no-validate", "--quiet", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lengths = [TOKENS[0]] * 2 + ([ctx - TOKENS[1]] if ctx <= FILLED[target] else [])  # the first warms up
    command = [sys.executable, "-c", RUN, str(out), *map(str, lengths)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return list(found.values())


def row(target: str, ctx: int, found: list[dict[str, Any]]) -> tuple[str, ...]:
    """found: behind the short prompt and, where it was filled, in a full cache."""
    tpots, ttfts = ([one[name] for one in found] for name in ("tpot", "ttft"))
    full = [f"{tpots[1]:.1f}", f"{ttfts[1] / 1e3:.1f}"] if len(found) > 1 else ["-", "-"]
    return target, str(ctx), f"{tpots[0]:.1f}", full[0], f"{ttfts[0]:.0f}", full[1], f"{found[-1]['pss']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ctx", default="1024,4096,16384,32768")
    given = parser.parse_args()
    checkpoint = geometry.write(given.folder / "checkpoint-270m", geometry.GEMMA_270M)
    rows = []
    for target in FILLED:
        for ctx in map(int, given.ctx.split(",")):
            rows.append(row(target, ctx, measured(checkpoint, given.folder, target, ctx)))
            print(*rows[-1], flush=True)
    keep(PAGE, START, END, f"{table(COLUMNS, rows)}\n\nOn 2 cores of {cpu_name()}.\n")


if __name__ == "__main__":
    main()
