"""A process of trials, a line of JSON for each.

python -m tests.faults.worker NAME SEED FIRST END SCRATCH
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from tests.faults.outcome import Trial

# Where the maker of each name's trials is: make(seed, scratch) -> Trial.
TRIALS = {
    "interrupts: int4, two graphs": "interrupts:int4",
    "interrupts: fp32, two graphs": "interrupts:fp32",
    "interrupts: int4, one graph at a time": "interrupts:unloading",
    "interrupts: growing cache": "interrupts:growing",
    "interrupts: a picture": "interrupts:picture",
    "threads: 8 on one engine": "threads:one_engine",
    "threads: 8 on a pool of 1": "threads:pool_of_1",
    "threads: 8 on a pool of 2": "threads:pool_of_2",
    "damages: int4 and its compiled folder": "damages:int4",
    "damages: fp32": "damages:fp32",
    "kills: export": "kills:export",
    "kills: validate": "kills:validate",
    "kills: compile": "kills:compile_",
    "hostile: manifests": "hostile:manifests",
    "hostile: chat templates": "hostile:templates",
    "hostile: arguments": "hostile:arguments",
    "hostile: safetensors headers": "strangers:headers",
    "hostile: images": "strangers:images",
    "endurance: generations": "endurance:generations",
    "processes: 4 over one bundle": "processes:four",
}


def main(name: str, seed: int, first: int, end: int, scratch: Path) -> None:
    file, _, maker = TRIALS[name].partition(":")
    make: Callable[[int, Path], Trial] = getattr(import_module(f"tests.faults.{file}"), maker)
    logging.getLogger("stillgraph").setLevel(logging.CRITICAL)
    # What libraries print goes elsewhere: stdout is for outcomes.
    outcomes = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trial = make(seed, scratch)
    for number in range(first, end):
        found = trial(number)
        print(json.dumps([found.kind, found.what]), file=outcomes, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
