"""What a contender is, and the one way in which all of them are measured, each in a process of its own.

Needs nothing but Python, because it runs in the environment of every peer. A contender's file ends with
`run(open_it)` and is started as `python FILE JSON`, where JSON is a `Request`; the last line on stdout is a
row.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

KIB = 1024 / 1e6  # megabytes (10^6 bytes) in a KiB of /proc
WARM_UP = 8  # tokens of the request that is not counted


@dataclass(frozen=True)
class Request:
    """What every contender is asked. model: a file or folder of its own kind; context_ids: a second, longer
    prompt, measured after the first in the same process, or none."""

    model: str
    ids: list[int]
    tokens: int
    threads: int
    ctx: int
    context_ids: list[int]


class Contender(Protocol):
    """A loaded model."""

    versions: dict[str, str]

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        """`count` greedy tokens after a prompt that is computed whole; stop tokens do not stop it."""


def run(open_it: Callable[[Request], Contender]) -> None:
    """Load, warm up, measure, print one row as JSON."""
    request = Request(**json.loads(sys.argv[1]))
    began = time.perf_counter()
    contender = open_it(request)
    row: dict[str, Any] = {"load_s": time.perf_counter() - began}
    loaded = pss_mb()
    row["first_ttft_ms"] = measure(contender, request.ids, WARM_UP)["ttft_ms"]
    row |= measure(contender, request.ids, request.tokens)
    row["peak_pss_mb"] = max(loaded, pss_mb())
    row["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    if request.context_ids:
        count = min(request.tokens, request.ctx - len(request.context_ids))
        far = measure(contender, request.context_ids, count)
        row |= {f"context_{key}": far[key] for key in ("ttft_ms", "tpot_ms")}
        row["context_ratio"] = far["tpot_ms"] / row["tpot_ms"]
    print(json.dumps(row | {"versions": contender.versions}))


def measure(contender: Contender, ids: list[int], count: int) -> dict[str, Any]:
    """One request. ttft_ms: up to the first token; tpot_ms: mean of the steps after it; tokens: the ids;
    other_cores: cores that the rest of the machine used meanwhile."""
    others = busy_seconds() - time.process_time()
    tokens, marks = [], [time.perf_counter()]
    for token in contender.generate(ids, count):
        marks.append(time.perf_counter())
        tokens.append(token)
    if len(tokens) != count:
        raise SystemExit(f"made {len(tokens)} tokens instead of {count}")
    others = busy_seconds() - time.process_time() - others
    return {
        "other_cores": max(0.0, others / (marks[-1] - marks[0])),
        "ttft_ms": 1e3 * (marks[1] - marks[0]),
        "tpot_ms": 1e3 * (marks[-1] - marks[1]) / (count - 1),
        "tokens": tokens,
    }


def pss_mb() -> float:
    """Proportional set size now. It walks every page, so it is never read during a request."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return KIB * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def busy_seconds() -> float:
    """Core seconds in which this machine was not idle, since it started; time stolen from it counts."""
    fields = [
        int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    ]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
