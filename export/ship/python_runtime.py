"""A runtime that is driven from Python: `drivers/python` and a backend of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillgraph.exporter.ship.environments import missing, python
from stillgraph.exporter.ship.runtimes import Runtime
from stillgraph.manifest import Target


class PythonRuntime(Runtime):
    """`generate.py` over the runtime's `backend.py`."""

    def __init__(self, name: str, title: str, targets: tuple[Target, ...] = ("portable",)) -> None:
        self.name, self.title, self.targets = name, title, targets
        self.sources = ("python", name)

    def command(self, folder: Path) -> Sequence[str] | str:
        interpreter = python(self.name)
        return [interpreter, "generate.py"] if interpreter else missing(self.name)
