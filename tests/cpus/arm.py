"""A Debian root for 64-bit Arm with Python, and the wheels of the runtime for it: made once, kept.

Nothing of it runs but under qemu's user mode, which looks a program's files up in a prefix first: its
libraries, and /proc/cpuinfo. Nothing is configured, no second stage: packages are unpacked, that is enough.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.cpus.lanes import ArmCpu, Lane

REPOSITORY = Path(__file__).parents[2]
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = f"python{PYTHON},libstdc++6,libgomp1"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
CORE = (
    "processor\t: {index}\nBogoMIPS\t: 50.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: 0x{part}\nCPU revision\t: 0\n\n"
)
CORES = 2
WANTED = ".wanted"  # beside the wheels: what they were installed for


class Missing(Exception):
    """What is not there, and so a class of CPU cannot be tried, in a few words."""


class Arm:
    """A root and wheels in a folder, which are made where they are not there yet. Raises Missing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.site = folder, folder / "root", folder / "site"
        if not self.root.is_dir():
            self._make_root()
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        dependencies: list[str] = project["dependencies"]
        constraints = (REPOSITORY / "constraints.txt").read_text(encoding="ascii")
        wanted = "\n".join([*dependencies, constraints])
        if _read(self.site / WANTED) != wanted:
            self._install(dependencies, wanted)

    def command(self, lane: Lane) -> list[str]:
        """Python on a CPU of the lane."""
        return [*lane.command(prefix=str(self._prefix(lane))), str(self.root / "usr/bin" / f"python{PYTHON}")]

    def _prefix(self, lane: Lane) -> Path:
        """The root as this CPU sees it. ONNX Runtime reads cpuinfo, and dies where it is of an x86."""
        assert lane.arm is not None
        prefix = self.folder / lane.model
        (prefix / "proc").mkdir(parents=True, exist_ok=True)
        for name in ("usr", "lib", "etc"):
            (prefix / name).unlink(missing_ok=True)
            (prefix / name).symlink_to((self.root / name).resolve())
        (prefix / "proc" / "cpuinfo").write_text(cpuinfo(lane.arm), encoding="ascii")
        return prefix

    def _make_root(self) -> None:
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        options = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}"]
        _run("debootstrap", *options, SUITE, str(unfinished))
        for package in sorted(unfinished.glob("var/cache/apt/archives/*.deb")):
            _run("dpkg", "-x", str(package), str(unfinished))
        unfinished.rename(self.root)

    def _install(self, dependencies: list[str], wanted: str) -> None:
        shutil.rmtree(self.site, ignore_errors=True)
        platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_aarch64")]
        options = ["--quiet", "--target", str(self.site), "--only-binary=:all:", "-c", "constraints.txt"]
        options += ["--python-version", PYTHON, "--implementation", "cp", *platforms]
        _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, *dependencies)
        (self.site / WANTED).write_text(wanted, encoding="ascii")


def cpuinfo(cpu: ArmCpu) -> str:
    """/proc/cpuinfo of such a CPU."""
    return "".join(CORE.format(index=i, features=cpu.features, part=cpu.part) for i in range(CORES))


def _read(path: Path) -> str | None:
    return path.read_text(encoding="ascii") if path.is_file() else None


def _run(*command: str) -> None:
    name = Path(command[0]).name
    if shutil.which(command[0]) is None:
        raise Missing(f"no {name}: apt-get install {name}")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        raise Missing(f"{name} failed: {lines[-1]}")
