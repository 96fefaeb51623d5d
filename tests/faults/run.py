"""`make faults`: every kind of fault, as a table.

    python -m tests.faults.run [--seed N] [--quick] [--long] [NAME ...]

The bundles are made in artifacts/faults, once. --quick: a tenth of the trials; --long: only what is random in
its input, ten times as long (`make fuzz`); NAME: only names that begin so. Exit code 1 when an answer was
silently wrong, or an exception raw.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from math import ceil

from stillgraph.cpu import cpu_name
from tests.faults import batch, subjects
from tests.faults.outcome import Tally, table
from tests.faults.worker import TRIALS

COUNTS = {
    "interrupts: int4, two graphs": 300,
    "interrupts: fp32, two graphs": 100,
    "interrupts: int4, one graph at a time": 100,
    "interrupts: growing cache": 100,
    "interrupts: a picture": 50,
    "threads: 8 on one engine": 512,
    "threads: 8 on a pool of 1": 256,
    "threads: 8 on a pool of 2": 256,
    "damages: int4 and its compiled folder": 350,
    "damages: fp32": 150,
    "kills: export": 10,
    "kills: validate": 10,
    "kills: compile": 80,
    "hostile: manifests": 400,
    "hostile: chat templates": 1000,
    "hostile: arguments": 1000,
    "hostile: safetensors headers": 100,
    "hostile: images": 1000,
    "endurance: generations": 2000,
    "processes: 4 over one bundle": 3,
}
RANDOM_INPUT = ("damages", "hostile")
CORES = 2


def main() -> int:
    given = _arguments()
    subjects.make()
    names = [name for name in TRIALS if name.startswith(tuple(given.names) or "")]
    if given.long:
        names = [name for name in names if name.startswith(RANDOM_INPUT)]
    share = 10.0 if given.long else 0.1 if given.quick else 1.0

    def one(name: str) -> Tally:
        limit = 300.0 if name.startswith("kills") else 60.0
        tally = batch.run(name, given.seed, ceil(COUNTS[name] * share), limit)
        print(f"{name}: {dict(tally.counts)}", *tally.bad[:20], sep="\n  ", flush=True)
        return tally

    began = time.monotonic()
    print(f"seed {given.seed}", flush=True)
    with ThreadPoolExecutor(CORES) as pool:
        tallies = list(pool.map(one, names))
    minutes = (time.monotonic() - began) / 60
    print(f"\n{table(tallies)}\nseed {given.seed}, {minutes:.1f} minutes on {CORES} cores of {cpu_name()}")
    return int(any(tally.failed for tally in tallies))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("names", nargs="*")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
