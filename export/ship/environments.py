"""Environments of other runtimes' packages, so that none comes into the user's own.

    python -m stillgraph.exporter.ship.environments openvino

makes them, under STILLGRAPH_ENVIRONMENTS or the user's cache folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

from stillgraph.exporter.ship.runtimes import DRIVERS
from stillgraph.serve.packages import PAGE, fetch, packages, place

# name: (the module that tells whether it is there, packages)
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ort": ("onnxruntime", ("numpy", "pillow", "onnxruntime")),
    "openvino": ("openvino", ("numpy", "pillow", "openvino")),
    "mnn": ("MNN", ("numpy", "pillow", "mnn")),
    "qnn": ("onnxruntime_qnn", ("numpy", "pillow", "onnxruntime==1.32.0", "onnxruntime-qnn==2.7.0")),
    "iree": ("iree", ("numpy", "pillow", "iree-base-compiler[onnx]==3.13.0", "iree-base-runtime==3.13.0")),
    "triton": ("tritonclient", ("tritonclient[grpc]",)),
}
# name: the folder whose package.json and lock file say what npm is to fetch
OF_NPM = {"node": DRIVERS / "node", "page": PAGE}


def python(name: str) -> str | None:
    """An interpreter that has the runtime's packages: its own environment's, or this one; None without."""
    own = place() / name / "bin" / "python"
    if own.is_file():
        return str(own)
    module = PACKAGES[name][0]
    return sys.executable if find_spec(module) else None


def variables() -> dict[str, str]:
    """This process's variables, less those by which one Python would find another's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def missing(name: str) -> str:
    """Why its driver cannot run, in a few words with the remedy."""
    what = "its packages of npm are" if name in OF_NPM else f"{PACKAGES[name][0]} is"
    return f"{what} not installed: python -m {__spec__.name} {name}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtimes", nargs="+", choices=sorted([*PACKAGES, *OF_NPM]))
    for name in parser.parse_args().runtimes:
        folder = place() / name
        if packages(name) or (folder / "bin" / "python").is_file():
            continue
        try:
            if name in OF_NPM:
                fetch(name, OF_NPM[name])
            else:
                _pip(PACKAGES[name][1], folder)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: ready in {folder}")
    return 0


def _pip(wanted: tuple[str, ...], folder: Path) -> None:
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *wanted], check=True)


if __name__ == "__main__":
    sys.exit(main())
