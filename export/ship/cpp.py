"""OpenVINO in C++. The driver is built with CMake, once for its sources and for OpenVINO's version.

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
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship import environments
from stillgraph.exporter.ship.runtimes import DRIVERS, STAGE, Runtime
from stillgraph.serve.packages import place

SOURCES = DRIVERS / "cpp"
HEADERS = {"nlohmann/json.hpp": "nlohmann-json3-dev", "png.h": "libpng-dev"}  # Debian's packages
WHERE = "import openvino, openvino.utils as u; print(openvino.__version__, u.get_cmake_path(), sep='\\n')"


class Cpp(Runtime):
    """A program that reads manifest.json alone."""

    name, title, sources = "c++", "OpenVINO in C++", ("cpp",)

    def command(self, folder: Path) -> Sequence[str] | str:
        return missing() or [str(program()), "."]


RUNTIME = Cpp()


def missing() -> str | None:
    """What this machine lacks to build the driver, in words; None where nothing is known to be missing."""
    if environments.python("openvino") is None:
        return environments.missing("openvino")
    if lacking := [name for name in ("cmake", "c++") if shutil.which(name) is None]:
        return f"{' and '.join(lacking)} not found: apt-get install cmake g++"
    source = "".join(f"#include <{header}>\n" for header in HEADERS)
    command = ["c++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=source, capture_output=True, text=True, check=False).returncode:
        return f"{' or '.join(HEADERS)} not found: apt-get install {' '.join(HEADERS.values())}"
    return None


def built() -> Path:
    """Where the driver is, or is to be, as a program."""
    return _built(_openvino()[0])


def _built(version: str) -> Path:
    digest = hashlib.sha256(version.encode())
    for path in RUNTIME.driver_files():
        if path.suffix != ".md":
            digest.update(path.read_bytes())
    return place() / f"c++-{digest.hexdigest()[:12]}"


def program() -> Path:
    """The driver as a program, built where it is not there yet. Raises StillgraphError."""
    version, cmake = _openvino()
    done = _built(version)
    if not done.is_file():
        done.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=done.parent) as folder:
            _run(["cmake", "-S", str(SOURCES), "-B", folder, f"-DOpenVINO_DIR={cmake}"])
            _run(["cmake", "--build", folder, "--parallel"])
            (Path(folder) / "generate").replace(done)
    return done


def _openvino() -> tuple[str, str]:
    """Its version, and the folder of its CMake files."""
    interpreter = environments.python("openvino") or sys.executable
    version, cmake = _run([interpreter, "-c", WHERE]).split("\n")[-3:-1]
    return version, cmake


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        said = next((line for line in lines if "error" in line.lower()), "it says nothing")
        problem = f"the C++ driver was not built, {Path(command[0]).name} failed ({said.strip():.300})"
        raise StillgraphError(STAGE, problem, "run the commands of its README.md by hand")
    return done.stdout


if __name__ == "__main__":
    print(missing() or program())
