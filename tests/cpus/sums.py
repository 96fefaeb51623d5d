"""What the graph of a case gives, against the sums of integers that it has to give.

Needs numpy and ONNX Runtime and no more, so that it runs wherever they do. Shapes as in products.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

from stillgraph.cpu import EXACT_SUMS

LEVEL = "session.qdq_matmulnbits_accuracy_level"  # of what ONNX Runtime makes of a portable product
PRECISE = {"session.x64quantprecision": "1"}  # kernels of u8 x s8 that do not saturate


def difference(folder: Path, entries: dict[str, str] | None = None) -> str | None:
    """None where every number is equal. entries: more of the session's options."""
    feeds, weights, found = outputs(folder, entries)
    weights = weights.astype(np.int64)
    expected = weights[feeds] if feeds.dtype == np.int64 else feeds.astype(np.int64) @ weights.T
    if (found == expected).all():
        return None
    error = np.abs(found - expected)
    index = np.unravel_index(error.argmax(), error.shape)
    place, count = ", ".join(map(str, index)), int((error > 0).sum())
    return f"{count} of {error.size} differ; worst at [{place}], {found[index]} for {expected[index]}"


def outputs(
    folder: Path, entries: dict[str, str] | None = None, optimized: Path | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feeds [F, ..], weights [N, K] and what the graph gives [F, .., N or K]; the last two in halves.

    optimized: a file for the graph as ONNX Runtime optimized it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for name, value in {LEVEL: "4", **EXACT_SUMS, **(entries or {})}.items():
        options.add_session_config_entry(name, value)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    with np.load(folder / "case.npz") as case:
        feeds, weights = case["feeds"], case["weights"]
    return feeds, weights, np.stack([session.run(None, {"x": x})[0] for x in feeds]) * 2.0
