"""ONNX Runtime, driven by a few lines of Python that need nothing of stillgraph. It runs both targets."""

from __future__ import annotations

from stillgraph.exporter.ship.python_runtime import PythonRuntime

RUNTIME = PythonRuntime("ort", "ONNX Runtime", targets=("portable", "onnxruntime"))
