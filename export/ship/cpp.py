"""OpenVINO in C++. The driver is built with CMake, once for its sources and for the library's version.

    python -m stillgraph.exporter.ship.cpp

builds it, and prints where it is.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship import environments
from stillgraph.exporter.ship.runtimes import DRIVERS, STAGE, Runtime
from stillgraph.exporter.targets import CacheWrite
from stillgraph.serve.packages import place

SOURCES = DRIVERS / "cpp"
HEADERS = {"nlohmann/json.hpp": "nlohmann-json3-dev", "png.h": "libpng-dev"}  # Debian's packages
WHERE = "import openvino, openvino.utils as u; print(openvino.__version__, u.get_cmake_path(), sep='\\n')"


@dataclass(frozen=True)
class Library:
    """A runtime's library for C++. options: what CMake is told of it."""

    version: str
    options: tuple[str, ...]


class Cpp(Runtime):
    """A program that reads manifest.json alone."""

    name, title, sources = "c++", "OpenVINO in C++", ("cpp",)
    cache_write: CacheWrite = "Where"  # twice as fast there

    def command(self, folder: Path) -> Sequence[str] | str:
        return self.missing() or [str(self.program()), "."]

    def lacking(self) -> str | None:
        """What there is not of the library, in words; None where it is there."""
        return environments.missing("openvino") if environments.python("openvino") is None else None

    def library(self) -> Library:
        interpreter = environments.python("openvino") or sys.executable
        version, cmake = output([interpreter, "-c", WHERE]).split("\n")[-3:-1]
        return Library(version, ("-DRUNTIME=openvino", f"-DOpenVINO_DIR={cmake}"))

    def missing(self) -> str | None:
        """What this machine lacks to have the program, in words; None where nothing is known to be."""
        if lacking := self.lacking():
            return lacking
        return None if self.built(self.library()).is_file() else _unable_to_build()

    def built(self, library: Library) -> Path:
        """Where the program is, or is to be."""
        digest = hashlib.sha256(repr(library).encode())
        for path in self.driver_files():
            if path.suffix != ".md":
                digest.update(path.read_bytes())
        return place() / f"{self.name}-{digest.hexdigest()[:12]}"

    def program(self) -> Path:
        """The program, built where it is not there yet. Raises StillgraphError."""
        library = self.library()
        done = self.built(library)
        if not done.is_file():
            done.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=done.parent) as folder:
                output(["cmake", "-S", str(SOURCES), "-B", folder, *library.options])
                output(["cmake", "--build", folder, "--parallel"])
                (Path(folder) / "generate").replace(done)
        return done


RUNTIME = Cpp()


def _unable_to_build() -> str | None:
    if lacking := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
        return f"{' and '.join(lacking)} not found: apt-get install cmake g++"
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=source, capture_output=True, text=True, check=False).returncode:
        return f"{' or '.join(HEADERS)} not found: apt-get install {' '.join(HEADERS.values())}"
    return None


def output(command: Sequence[str], folder: Path | None = None) -> str:
    """What a command that helps to build prints, run in a folder. Raises StillgraphError where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        said = next((line for line in lines if "error" in line.lower()), "it says nothing")
        problem = f"the C++ driver was not built, {Path(command[0]).name} failed ({said.strip():.300})"
        raise StillgraphError(STAGE, problem, "run the commands of its README.md by hand")
    return done.stdout


if __name__ == "__main__":
    print(RUNTIME.missing() or RUNTIME.program())
