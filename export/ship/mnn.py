"""MNN. Its converter makes a file of each graph; graphs over the same weights share a file of those.

Its ScatterElements writes a token into wrong slots of a cache and says nothing, so a decode writes by Where.
Its DequantizeLinear knows no blocks, and it does not load weights of fp16: in both places they become fp32.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
import uuid
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.ship.environments import variables
from stillgraph.exporter.ship.python_runtime import PLAIN, ConvertedRuntime
from stillgraph.exporter.ship.runtimes import STAGE
from stillgraph.exporter.ship.widened import widen_blocks, widen_halves
from stillgraph.exporter.targets import CacheWrite
from stillgraph.manifest import GraphEntry

# Its own command would install a package that reports to its makers, into whatever Python it finds.
CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"
OPTIONS = ("-f", "ONNX", "--bizCode", "stillgraph", "--keepInputFormat", "--saveExternalData")
WEIGHTS = ".weight"
UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Mnn(ConvertedRuntime):
    cache_write: CacheWrite = "Where"
    widened = widen_blocks, widen_halves

    def convert(self, interpreter: str, folder: Path, place: Path, entry: GraphEntry) -> None:
        """Write NAME.mnn and NAME.mnn.weight."""
        name = f"{entry.shape.name}.mnn"
        said = _run([interpreter, "-c", CONVERT, "--modelFile", PLAIN, "--MNNModel", name, *OPTIONS], place)
        if not (place / name).is_file():
            problem = f"MNN's converter did not take {entry.file.path} ({said:.300})"
            raise StillgraphError(STAGE, problem, "ship another precision, or report this with MNN's version")
        _name_by_content(place / name, entry.file.sha256)
        for made in (name, f"{name}{WEIGHTS}"):
            (place / made).replace(folder / made)

    def share_weights(self, interpreter: str, folder: Path, prefill: str, decode: str) -> None:
        shared, own = (folder / f"{name}.mnn{WEIGHTS}" for name in (prefill, decode))
        if filecmp.cmp(shared, own, shallow=False):
            own.unlink()


RUNTIME = Mnn("mnn", "MNN")


def _name_by_content(path: Path, sha256: str) -> None:
    """Name a model after its graph in place of at random, so that its bytes are the same again."""
    path.write_bytes(UUID.sub(str(uuid.UUID(sha256[:32])).encode(), path.read_bytes(), count=1))


def _run(command: list[str], place: Path) -> str:
    """The last line that it says."""
    done = subprocess.run(command, cwd=place, env=variables(), capture_output=True, text=True, check=False)
    return ((done.stderr + done.stdout).strip().splitlines() or ["it says nothing"])[-1]
