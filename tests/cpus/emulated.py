"""The tests marked `kernels`, as x86 CPUs of other classes run them, side by side.

    python -m tests.cpus.emulated [LANE...]

One process a lane: pytest-xdist would start its workers natively. Exit code 1 when a lane fails. Where qemu
is not to be had, a line says so and nothing fails.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.cpus import cores
from tests.cpus.lanes import LANE, LANES, X86, Lane

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark.kernels"
NOISE = re.compile(r"warning: TCG doesn't support requested feature")  # qemu's, of flags no kernel asks for
PYTEST = (
    "-m",
    "pytest",
    "-m",
    "kernels",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:hypothesispytest",
)


def marked() -> list[str]:
    """The files with such tests: to collect all others under emulation takes a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARK in path.read_text(encoding="utf-8")]


def run(lane: Lane) -> tuple[int, str]:
    """The exit code of a lane, and what it printed: all where it failed, else the last line."""
    command = [*lane.command(), sys.executable, *PYTEST, *marked()]
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {LANE: lane.name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line and not NOISE.search(line)]
    shown = lines[-1:] if done.returncode == 0 else lines
    label = f"{lane.title} ({lane.emulator} -cpu {lane.model}, {time.monotonic() - began:.0f} s)"
    return done.returncode, "\n".join(f"{label}: {line}" for line in shown or ["nothing was printed"])


def problem() -> str | None:
    """Why no lane can run here, or None."""
    if platform.machine() != "x86_64":
        return f"this machine is {platform.machine()}, whose Python is none for x86"
    if shutil.which(X86) is None:
        return f"no {X86}: apt-get install qemu-user"
    return None


def main(names: list[str]) -> int:
    if why := problem():
        print(f"kernels are not tested as other CPUs run them: {why}")
        return 0
    lanes = [lane for lane in LANES.values() if lane.emulator == X86 and (not names or lane.name in names)]
    codes = []
    with cores.pool() as pool:
        for code, text in pool.map(run, lanes):
            print(text, flush=True)
            codes.append(code)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
