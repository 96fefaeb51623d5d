"""Runtimes that are driven from Python: `drivers/python` and a backend of their own."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from stillgraph.errors import StillgraphError
from stillgraph.exporter.config import Say
from stillgraph.exporter.ship.environments import missing, python
from stillgraph.exporter.ship.runtimes import STAGE, Runtime
from stillgraph.exporter.weights import WEIGHTS_FILE
from stillgraph.manifest import GraphEntry, Manifest, Target

PLAIN = "plain.onnx"  # a graph as a converter can read it


class PythonRuntime(Runtime):
    """`generate.py` over the runtime's `backend.py`."""

    def __init__(self, name: str, title: str, targets: tuple[Target, ...] = ("portable",)) -> None:
        self.name, self.title, self.targets = name, title, targets
        self.sources = ("python", name)

    def command(self, folder: Path) -> Sequence[str] | str:
        interpreter = python(self.name)
        return [interpreter, "generate.py"] if interpreter else missing(self.name)


class ConvertedRuntime(PythonRuntime):
    """One that has files of its own made of the graphs, and of weights that prefill and decode may share.

    widened: what is done to a graph before, for ops or types that it lacks.
    """

    widened: ClassVar[tuple[Callable[[ir.Graph], int], ...]] = ()

    def fill(self, folder: Path, manifest: Manifest, say: Say) -> Manifest:
        interpreter = python(self.name)
        if interpreter is None:
            raise StillgraphError(STAGE, missing(self.name), "run that command")
        with TemporaryDirectory(dir=folder) as place:
            # Converters do not read a weights file that has more than one link.
            shutil.copyfile(folder / WEIGHTS_FILE, Path(place) / WEIGHTS_FILE)
            for entry in manifest.graphs.values():
                say(f"converting {entry.shape.name}")
                self._write_plain(folder, Path(place), entry)
                self.convert(interpreter, folder, Path(place), entry)
        prefill, decode = (
            graph.shape.name for role in ("prefill", "decode") if (graph := manifest.graph(role))
        )
        self.share_weights(interpreter, folder, prefill, decode)
        return manifest

    def _write_plain(self, folder: Path, place: Path, entry: GraphEntry) -> None:
        shutil.copyfile(folder / entry.file.path, place / entry.file.path)
        model = ir.load(place / entry.file.path)
        for widen in self.widened:
            widen(model.graph)
        common.RemoveUnusedNodesPass()(model)
        ir.save(model, place / PLAIN, external_data="plain.data")

    @abstractmethod
    def convert(self, interpreter: str, folder: Path, place: Path, entry: GraphEntry) -> None:
        """Write what is made of a graph beside it. place: a folder to work in, with the graph as `PLAIN`.

        Raises StillgraphError.
        """

    @abstractmethod
    def share_weights(self, interpreter: str, folder: Path, prefill: str, decode: str) -> None:
        """Remove the decode's file of weights where the prefill's serves. Both are names of graphs."""
