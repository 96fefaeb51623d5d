"""What the graph of a case gives, against the sums of integers that it has to give.

Needs numpy and ONNX Runtime and no more, so that it runs wherever they do. Shapes as in products.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

LEVEL = "session.qdq_matmulnbits_accuracy_level"  # of what ONNX Runtime makes of a portable product
PRECISE = {"session.x64quantprecision": "1"}  # kernels of u8 x s8 that do not saturate
# Arm's KleidiAI takes over int4 products of whole blocks, and rounds activations row by row.
NO_KLEIDIAI = {"mlas.disable_kleidiai": "1"}
STEPS = 255  # of a row in KleidiAI, from its smallest activation or 0 to its largest or 0


@dataclass(frozen=True)
class Difference:
    """How far a graph is from the sums. by_row: no farther than rounding each row of x by itself takes it."""

    text: str
    by_row: bool


def difference(folder: Path, entries: dict[str, str] | None = None) -> Difference | None:
    """None where every number is equal. entries: more of the session's options."""
    feeds, weights, found = outputs(folder, entries)
    weights = weights.astype(np.int64)
    gather = feeds.dtype == np.int64
    expected = weights[feeds] if gather else feeds.astype(np.int64) @ weights.T
    if (found == expected).all():
        return None
    error = np.abs(found - expected)
    index = np.unravel_index(error.argmax(), error.shape)
    place, count = ", ".join(map(str, index)), int((error > 0).sum())
    text = f"{count} of {error.size} differ; worst at [{place}], {found[index]} for {expected[index]}"
    if gather:
        return Difference(text, by_row=False)
    # Half a step of rounding, and half a step of the zero point, which is a whole number too.
    step = (np.maximum(feeds, 0).max(-1) - np.minimum(feeds, 0).min(-1)) / STEPS
    return Difference(text, bool((error <= step[..., None] * np.abs(weights).sum(-1)).all()))


def outputs(
    folder: Path, entries: dict[str, str] | None = None, optimised: Path | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Feeds [F, ..], weights [N, K] and what the graph gives [F, .., N or K]; the last two in halves.

    optimised: a file for the graph as ONNX Runtime optimised it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for name, value in {LEVEL: "4", **(entries or {})}.items():
        options.add_session_config_entry(name, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = ort.InferenceSession(str(folder / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    with np.load(folder / "case.npz") as case:
        feeds, weights = case["feeds"], case["weights"]
    return feeds, weights, np.stack([session.run(None, {"x": x})[0] for x in feeds]) * 2.0
