"""One class of CPU tried on all cases, and what is wrong with what was found."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from stillgraph.engine import Engine
from tests.cpus import emulated, ties
from tests.cpus.arm import Arm, Missing
from tests.cpus.cases import BUNDLES
from tests.cpus.lanes import Lane, native
from tests.cpus.probe import Found

ROOT = Path(__file__).parents[2]
OURS = ROOT / "build/editable"  # our package under its name, which an interpreter for Arm has not installed
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Trial:
    """A class, how it was run, what multiplies integers there, and what was found.

    why_not: why it was not tried. problems: what is wrong. partings: by bundle, where tokens part from those
    of the native class, each at a near tie or a problem as well. seconds: all of the trial.
    """

    title: str
    how: str
    kernel: str
    found: Found | None = None
    why_not: str | None = None
    problems: tuple[str, ...] = ()
    partings: dict[str, list[ties.Parting]] | None = None
    seconds: float = 0.0


def run(lane: Lane | None, folder: Path, arm: Arm | Missing | None = None) -> Trial:
    """Try a class on the cases in a folder; None: the native one. arm: of an Arm lane."""
    if lane is None:
        how, kernel = native(CPUINFO.read_text(encoding="utf-8"))
        trial = Trial("native", how, kernel)
        command, path = [sys.executable], [ROOT]
    else:
        trial = Trial(lane.title, f"{lane.emulator} -cpu {lane.model}", lane.kernel)
        if shutil.which(lane.emulator) is None:
            return replace(trial, why_not=f"no {lane.emulator}: apt-get install qemu-user")
        if lane.arm is None and platform.machine() != "x86_64":
            return replace(trial, why_not=f"the Python at hand is for {platform.machine()}")
        if isinstance(arm, Missing):
            return replace(trial, why_not=str(arm))
        command, path = [*lane.command(), sys.executable], [ROOT]
        if lane.arm is not None:
            assert arm is not None
            command, path = arm.command(lane), [arm.site, ROOT]
    began = time.monotonic()
    found = _probed([*command, "tests/cpus/probe.py", str(folder)], path)
    trial = replace(trial, seconds=time.monotonic() - began)
    if isinstance(found, str):
        return replace(trial, problems=(f"it died: {found}",))
    return replace(trial, found=found, problems=tuple(_problems(lane, found)))


def _probed(command: list[str], path: list[Path]) -> Found | str:
    """What the probe found, or its last words."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, OURS]))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return Found.from_json(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line and not emulated.NOISE.search(line)]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _problems(lane: Lane | None, found: Found) -> list[str]:
    problems = [product.wrong for product in found.products.values() if product.wrong]
    if not found.precise:
        problems.append("codes over the full range are wrong even with session.x64quantprecision")
    if lane is not None:
        if why := lane.is_not(found.features):
            problems.append(f"it is not what it says: {why}")
        if found.full_range == lane.saturates:
            exact = "exact" if found.full_range else "not exact"
            problems.append(f"it is not what it says: codes over the full range are {exact}")
    return problems


def against(trial: Trial, base: Found, engines: dict[str, Engine], prompts: list[list[int]]) -> Trial:
    """The trial with where its tokens part from those that the native class found."""
    if trial.found is None:
        return trial
    partings: dict[str, list[ties.Parting]] = {}
    problems = list(trial.problems)
    for bundle in BUNDLES:
        rows = zip(prompts, base.tokens[bundle.name], trial.found.tokens[bundle.name], strict=True)
        parted = [ties.part(engines[bundle.name], *row) for row in rows]
        partings[bundle.name] = [parting for parting in parted if parting is not None]
        for parting in partings[bundle.name]:
            if parting.gap > ties.NEAR[bundle.precision]:
                where = f"{bundle.name}: token {parting.index} is not the native class's"
                problems.append(f"{where}, by {parting.gap:.1e} of the largest logit")
    return replace(trial, partings=partings, problems=tuple(problems))
