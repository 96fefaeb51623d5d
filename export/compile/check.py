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
from stillgraph.manifest import GraphEntry

Array = npt.NDArray[Any]
Variant = tuple[Path, ort.SessionOptions]  # a graph file and how to open it
# The same kernels over the same weights give the same bits, and other fusions reorder sums of fp32: by 2e-6
# over 8 layers. Weights in a wrong place, or packed in another layout, are off by the size of the values.
SAME = 1e-5
NUMPY = {"int64": np.int64, "float32": np.float32, "float16": np.float16}


def compare(plain: Variant, other: Variant, entry: GraphEntry, vocab: int, seed: int = 0) -> float:
    """The largest difference of any output, relative to that output's largest magnitude.

    One graph is in memory at a time, and its present lies in the buffers of its past wherever it may. Raises
    CheckFailed where the difference is over `SAME`.
    """
    expected = outputs(plain, entry, random_inputs(entry, vocab, seed))
    found = outputs(other, entry, random_inputs(entry, vocab, seed))
    name, worst = max(((name, difference(expected[name], found[name])) for name in expected), key=_size)
    if not worst <= SAME:
        problem = f"{name} of compiled {entry.shape.name} is off by {worst:.2e} of its largest value"
        raise CheckFailed("compile", problem, "please report this bug")
    return worst


def difference(expected: Array, found: Array) -> float:
    """Largest difference over largest expected magnitude; NaN where either has one."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return float(np.abs(expected - found).max() / (np.abs(expected).max() or 1.0))


def _size(named: tuple[str, float]) -> float:
    return np.inf if np.isnan(named[1]) else named[1]


def outputs(variant: Variant, entry: GraphEntry, inputs: dict[str, Array]) -> dict[str, Array]:
    """Every output by name; inputs are overwritten where an output may lie in their buffer."""
    path, options = variant
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    past_of = {alias.output: alias.input for alias in entry.aliases if alias.same_buffer}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
    results = {}
    for port in entry.inputs:
        binding.bind_ortvalue_input(port.name, values[port.name])
    for port in entry.outputs:
        past = past_of.get(port.name)
        results[port.name] = inputs[past] if past else np.zeros(port.sizes, NUMPY[port.dtype])
        value = values[past] if past else ort.OrtValue.ortvalue_from_numpy(results[port.name])
        binding.bind_ortvalue_output(port.name, value)
        values[f"output {port.name}"] = value  # kept alive for the run
    session.run_with_iobinding(binding)
    return results


def random_inputs(entry: GraphEntry, vocab: int, seed: int) -> dict[str, Array]:
    """Inputs in the valid range: random ids, all `max_len` tokens in use, normal keys and values, and a past
    that leaves room for the new tokens."""
    rng = np.random.default_rng(seed)
    shape, arrays = entry.shape, dict[str, Array]()
    past = min(shape.max_len, (shape.ctx or shape.max_len) - shape.max_len)
    for port in entry.inputs:
        if port.name == "input_ids":  # [B, P]
            arrays[port.name] = rng.integers(0, vocab, port.sizes)
        elif port.name.endswith("_length"):  # [B]
            length = shape.max_len if port.name == "prompt_length" else max(past, 0)
            arrays[port.name] = np.full(port.sizes, length, np.int64)
        else:
            arrays[port.name] = rng.standard_normal(port.sizes, np.float32).astype(NUMPY[port.dtype])
    return arrays
