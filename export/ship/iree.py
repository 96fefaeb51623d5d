"""IREE. Its compiler makes a module of each graph; the weights of both lie in one file of parameters.

Its DequantizeLinear knows no blocks, so weights of few bits are dequantized in plain ops, four bits as eight.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship.environments import variables
from stillgraph.exporter.ship.python_runtime import PLAIN, ConvertedRuntime
from stillgraph.exporter.ship.runtimes import STAGE
from stillgraph.exporter.ship.widened import widen_blocks
from stillgraph.manifest import GraphEntry

CPU = "x86-64-v3"  # with AVX2; NAME.mlir is there to be compiled for another
SCOPE = "weights"  # what the modules call the file of parameters
LARGE = 256  # numbers of a constant that is not in the module but among the parameters
IMPORT = (
    "--externalize-params",
    *("--params-scope", SCOPE, "--num-elements-threshold", f"{LARGE}", "--opset-version", "21"),
)
TARGET = ("--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu")
# Whether all that the second file has is in the first one.
CONTAINS = """
import sys, iree.runtime as iree
def entries(path):
    index = iree.ParameterIndex()
    index.load(path)
    return {name: bytes(entry.file_view) for name, entry in index.items()}
first, second = map(entries, sys.argv[1:])
sys.exit(not all(first.get(name) == content for name, content in second.items()))
"""


class Iree(ConvertedRuntime):
    widened = (widen_blocks,)

    def __init__(self, cpu: str = CPU) -> None:
        super().__init__("iree", "IREE")
        self.cpu = cpu

    def for_chip(self, chip: str) -> Iree:
        """For the CPU that LLVM calls so, such as `znver4` or `host`."""
        return Iree(chip)

    def share_weights(self, interpreter: str, folder: Path, prefill: str, decode: str) -> None:
        shared, own = f"{prefill}.irpa", f"{decode}.irpa"
        if not subprocess.run([interpreter, "-c", CONTAINS, shared, own], cwd=folder, check=False).returncode:
            (folder / own).unlink()

    def convert(self, interpreter: str, folder: Path, place: Path, entry: GraphEntry) -> None:
        """Write NAME.mlir, NAME.irpa and NAME.vmfb."""
        source, weights, module = (f"{entry.shape.name}.{ending}" for ending in ("mlir", "irpa", "vmfb"))
        cpu = f"--iree-llvmcpu-target-cpu={self.cpu}"
        for tool, *words in (
            ["iree-import-onnx", PLAIN, "-o", source, *IMPORT, "--save-params-to", weights],
            ["iree-compile", source, "-o", module, *TARGET, cpu],
        ):
            what = f"{entry.file.path} for the CPU {self.cpu}"
            _run([Path(interpreter).with_name(tool), *words], place, what)
        for made in (source, weights, module):
            (place / made).replace(folder / made)


RUNTIME = Iree()


def _run(command: Sequence[str | Path], place: Path, what: str) -> None:
    done = subprocess.run(command, cwd=place, env=variables(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "it says nothing")
        problem = f"{Path(command[0]).name} did not take {what} ({said.strip():.300})"
        raise StillgraphError(
            STAGE, problem, "name another --soc, ship another precision, or report this with IREE's version"
        )
