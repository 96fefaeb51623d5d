"""ONNX Runtime in Node.js: the driver in JavaScript that the page of `stillgraph serve` has, too."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stillgraph.exporter.ship.environments import missing
from stillgraph.exporter.ship.runtimes import Runtime
from stillgraph.serve.packages import MODULES, PAGE, packages


class Node(Runtime):
    """`generate.mjs` over the modules of the page."""

    name, title, sources = "node", "ONNX Runtime for Node.js", ("node",)

    def driver_files(self) -> list[Path]:
        return [*super().driver_files(), *(PAGE / name for name in MODULES)]

    def command(self, folder: Path) -> Sequence[str] | str:
        node, modules = shutil.which("node"), packages("node")
        if node is None:
            return "Node.js is not installed"
        return [node, "generate.mjs", "--packages", str(modules)] if modules else missing("node")


RUNTIME = Node()
