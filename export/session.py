"""Open a graph file for comparison: mapped weights, and ONNX Runtime's own optimisations on or off."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort


def open_graph(path: Path, optimised: bool) -> ort.InferenceSession:
    """A session on the CPU. Weights are not packed, or they would be copied."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
