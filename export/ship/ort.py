"""ONNX Runtime, driven by a few lines of Python that need nothing of stillgraph."""

from __future__ import annotations

from stillgraph.exporter.ship.python_runtime import PythonRuntime
from stillgraph.manifest import Manifest


class Ort(PythonRuntime):
    """It runs both targets."""

    def refuses(self, manifest: Manifest) -> str | None:
        return super().refuses(manifest.model_copy(update={"target": "portable"}))


RUNTIME = Ort("ort", "ONNX Runtime")
