"""Measure one contender in this process: `python worker.py CONTENDER_FILE REQUEST_JSON`.

Runs in the environment of every contender, so it needs nothing but Python and imports nothing of ours. The
contender's file has a function `open_contender(request)` that returns a `LoadedContender`. The last line on
stdout is a row of JSON, the keys of `Run` in report.py less `turn`, and what the contender says of itself.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

KIB = 1024 / 1e6  # megabytes (10^6 bytes) in a KiB of /proc
WARM_UP = 8  # new tokens of the first request, which is not counted
PREFILLS = 3  # whose median is TTFT: one alone is the noisiest figure of a run


@dataclass(frozen=True)
class Request:
    """What every contender is asked.

    model: a file or folder of its own kind; ids: the prompt; tokens: how many to make; options: words of its
    own kind, such as {"dtype": "bfloat16"}; image: path of a picture whose image tokens are among the ids,
    only for contenders that see. logits: a file for the logits over the texts, which is then all that is
    asked; texts: ids of each.
    """

    model: str
    ids: list[int]
    tokens: int
    threads: int
    ctx: int
    options: dict[str, str]
    image: str | None = None
    logits: str | None = None
    texts: list[list[int]] = field(default_factory=list)


class LoadedContender(Protocol):
    """A loaded model.

    facts: what it says of itself, any of: versions {package: version}, weights_mb, cache_mb, read_mb.
    swap_seconds: time spent so far on loading graphs since it was opened; 0.0 where it never does.
    vision_seconds: time spent so far from pixels to features; only of contenders that see.
    """

    facts: dict[str, Any]
    swap_seconds: float

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        """`count` greedy tokens after a prompt that is computed whole; stop tokens do not stop it."""

    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        """A float32 array [V] after each of ids[first:]: all before is a prompt, then it is token by token.

        A contender may lack this method.
        """


def main(file: str, request: Request) -> dict[str, Any]:
    """Load, warm up, measure: one row. TTFT is of several requests, of which all but the last end there."""
    began = time.monotonic()
    sys.path[0] = str(Path(file).resolve().parent)  # a contender finds its neighbors, not those of this file
    contender: LoadedContender = runpy.run_path(file)["open_contender"](request)
    if request.logits is not None:
        return write_logits(contender, request.texts, Path(request.logits))
    marks = [(began, "load"), (time.monotonic(), "first request")]
    loaded = pss_mb()
    first = measure(contender, request.ids, min(WARM_UP, request.tokens), marks)
    warm = pss_mb()
    marks.append((time.monotonic(), "request"))
    before = [measure(contender, request.ids, 1, []) for _ in range(PREFILLS - 1)]
    row = measure(contender, request.ids, request.tokens, marks)
    row |= {name: statistics.median(one[name] for one in [*before, row]) for name in ("ttft_ms", "vision_ms")}
    known = [value for value in (loaded, warm, pss_mb()) if value is not None]
    return row | {
        "load_ms": 1e3 * (marks[1][0] - began),
        "first_ttft_ms": first["ttft_ms"] + first["swap_ms"],
        "peak_pss_mb": max(known) if known else None,
        "peak_rss_mb": peak_rss_mb(),
        "marks": marks,
        "facts": contender.facts,
    }


def write_logits(contender: LoadedContender, texts: list[list[int]], path: Path) -> dict[str, Any]:
    """Those of the second half of each text, less its last token, one after another: [n, V]."""
    if not hasattr(contender, "logits"):
        return {"rows": 0}
    rows = 0
    with path.open("wb") as file:
        for ids in texts:
            for logits in contender.logits(ids[:-1], len(ids) // 2):
                file.write(memoryview(logits).cast("B"))
                rows += 1
    return {"rows": rows}


def measure(
    contender: LoadedContender, ids: list[int], count: int, marks: list[tuple[float, str]]
) -> dict[str, Any]:
    """One request; its phases are added to `marks`. Graphs that are loaded within it count as swap_ms."""
    marks.append((time.monotonic(), "prefill"))
    tokens, swapped, saw = [], contender.swap_seconds, getattr(contender, "vision_seconds", 0.0)
    others = busy_seconds() - time.process_time()
    began = time.perf_counter()
    clock = [(began, swapped)]
    for token in contender.generate(ids, count):
        clock.append((time.perf_counter(), contender.swap_seconds))
        tokens.append(token)
        if len(tokens) == 1:
            marks.append((time.monotonic(), "decode"))
    if len(tokens) != count:
        raise SystemExit(f"made {len(tokens)} tokens instead of {count}")
    others = busy_seconds() - time.process_time() - others
    times = [1e3 * ((t1 - t0) - (s1 - s0)) for (t0, s0), (t1, s1) in pairwise(clock)]
    return {
        "ttft_ms": times[0],
        "step_ms": times[1:],
        "swap_ms": 1e3 * (clock[-1][1] - swapped),
        "vision_ms": 1e3 * (getattr(contender, "vision_seconds", 0.0) - saw),
        "other_cores": max(0.0, others / (clock[-1][0] - began)),
        "tokens": tokens,
    }


def pss_mb() -> float | None:
    """Proportional set size now. It walks every page, so it is never read during a request."""
    return of_proc("smaps_rollup", "Pss:")


def peak_rss_mb() -> float:
    """On Linux not getrusage's, with which a process begins at the peak of the one that started it."""
    peak = of_proc("status", "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB if peak is None else peak


def of_proc(name: str, line: str) -> float | None:
    """A line of a file of this process, as MB. None where the system is not Linux."""
    try:
        lines = Path("/proc/self", name).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return KIB * next(int(each.split()[1]) for each in lines if each.startswith(line))


def busy_seconds() -> float:
    """Core seconds in which this machine was not idle, since it started; time stolen from it counts."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text("ascii").splitlines()[0].split()[1:9]]
    except OSError:
        return time.process_time()  # unknown: nobody else
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Request(**json.loads(sys.argv[2])))))
