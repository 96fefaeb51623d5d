"""This machine's CPU: a name for a folder, the instruction sets it has, and the cores a process may use."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What the name shows of a CPU, best first: the flag of /proc/cpuinfo (x86 or Arm) and its word in the name.
LEVELS = {"amx_int8": "amx", "avx512f": "avx512", "avx2": "avx2", "i8mm": "i8mm", "asimddp": "dotprod"}
# Options of a session with which products round activations by block, as their op says, on every CPU.
# On Arm, KleidiAI would take over int4 products of whole blocks and round by row.
EXACT_SUMS = {"mlas.disable_kleidiai": "1"}


def cpu_name() -> str:
    """This CPU as a folder's name, such as `amd-epyc-avx512-0123abcd`: what packed weights depend on."""
    return describe_cpu(_cpuinfo(), platform.machine())


def present_flags() -> list[str]:
    """This CPU's instruction sets, as Linux names them, sorted; none on a system that does not tell."""
    return sorted(cpu_flags(_cpuinfo()))


def available_cores() -> int:
    """Cores this process may use: fewer than the machine's in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def lacking(needed: Iterable[str]) -> list[str]:
    """Which of the instruction sets, as Linux names them in /proc/cpuinfo, this CPU does not have.

    None on a system that does not tell.
    """
    flags = cpu_flags(_cpuinfo())
    return [name for name in needed if name not in flags] if flags else []


def describe_cpu(cpuinfo: str, machine: str) -> str:
    """The name from the text of /proc/cpuinfo, may be empty, and the machine's architecture.

    Its last part hashes the instruction sets: ONNX Runtime chooses its kernels, and with them the layout of
    packed weights, by these.
    """
    flags = sorted(cpu_flags(cpuinfo))
    model = dict(_fields(cpuinfo)).get("model name", "").lower()
    level = next((word for flag, word in LEVELS.items() if flag in flags), "")
    slug = re.sub("[^a-z0-9]+", "-", re.sub(r"\(\w+\)|@.*|\bcpu\b|\d+-core|\bprocessor\b", "", model)).strip(
        "-"
    )
    digest = hashlib.sha256(" ".join([machine, *flags]).encode()).hexdigest()[:8]
    return "-".join(part for part in (slug[:32].strip("-") or machine.lower(), level, digest) if part)


def cpu_flags(cpuinfo: str) -> set[str]:
    """The instruction sets of the first processor in the text of /proc/cpuinfo."""
    fields = dict(_fields(cpuinfo))
    return set((fields.get("flags") or fields.get("Features") or "").split())


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _fields(cpuinfo: str) -> Iterator[tuple[str, str]]:
    """The fields of the first processor."""
    for line in cpuinfo.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()
