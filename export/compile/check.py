"""Run two files of one graph as the runtime would, on the same random inputs, and compare what comes out.

Shapes: B rows, P prompt tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from stillgraph.errors import CheckFailed
from stillgraph.exporter.ort import SAME, difference, run
from stillgraph.manifest import GraphEntry

Array = npt.NDArray[Any]
Variant = tuple[Path, ort.SessionOptions]  # a graph file and how to open it


def compare(plain: Variant, other: Variant, entry: GraphEntry, vocab: int, seed: int = 0) -> float:
    """The largest difference of any output, relative to that output's largest magnitude.

    One graph is in memory at a time, and its present lies in the buffers of its past wherever it may. Raises
    CheckFailed where the difference is over `SAME`.
    """
    expected, found = (outputs(one, entry, random_inputs(entry, vocab, seed)) for one in (plain, other))
    differences = list(map(difference, expected, found))
    at = int(np.argmax(differences))  # of a NaN, where there is one
    name, worst = entry.outputs[at].name, differences[at]
    if not worst <= SAME:
        problem = f"{name} of compiled {entry.shape.name} is off by {worst:.2e} of its largest value"
        raise CheckFailed("compile", problem, "please report this bug")
    return worst


def outputs(variant: Variant, entry: GraphEntry, inputs: dict[str, Array]) -> list[Array]:
    """Every output in order; inputs are overwritten where an output may lie in their buffer."""
    path, options = variant
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return run(session, inputs, entry.aliases)


def random_inputs(entry: GraphEntry, vocab: int, seed: int) -> dict[str, Array]:
    """Inputs in the valid range: random ids, all `max_len` tokens in use, normal keys and values, and a past
    that leaves room for the new tokens."""
    rng = np.random.default_rng(seed)
    shape, arrays = entry.shape, dict[str, Array]()
    past = min(shape.max_len, (shape.ctx or shape.max_len) - shape.max_len)
    for port in entry.inputs:
        if port.role == "token_ids":  # [B, P]
            arrays[port.name] = rng.integers(0, vocab, port.sizes)
        elif port.role in ("valid_length", "past_length"):  # [B]
            length = shape.max_len if port.role == "valid_length" else max(past, 0)
            arrays[port.name] = np.full(port.sizes, length, np.int64)
        else:
            arrays[port.name] = rng.standard_normal(port.sizes, np.float32).astype(port.dtype)
    return arrays
