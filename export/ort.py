"""Open and run a graph file for comparison: mapped weights, ONNX Runtime's own optimizations on or off."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from stillgraph.cpu import EXACT_SUMS
from stillgraph.manifest import Alias

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
# The same kernels over the same weights give the same bits, and other fusions reorder sums of fp32: by 2e-6
# over 8 layers. Weights in a wrong place, or packed in another layout, are off by the size of the values.
SAME = 1e-5


def session_options() -> ort.SessionOptions:
    """Options of every session of the export: errors alone are logged, and sums are exact on every CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in EXACT_SUMS.items():
        options.add_session_config_entry(name, value)
    return options


def open_graph(path: Path, optimized: bool, pack: bool = False) -> ort.InferenceSession:
    """A session on the CPU. pack: copy weights as the fast kernels want them, where no other kernels serve.

    Without packing MatMulNBits widens weights to fp32 and multiplies in fp32; with it, int8 by int4 or int8.
    """
    options = session_options()
    options.add_session_config_entry("session.disable_prepacking", "0" if pack else "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_cpu_mem_arena = False
        # Else all weights are widened to fp32 before the first product, and held. By priority means in the
        # order of the file, but for ops without a kernel, which come last.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


Empty = Callable[[Sequence[int], Any], np.ndarray]  # an array of a shape and a dtype, as np.empty makes it


def empty_in(folder: Path) -> Empty:
    """Makes arrays whose pages are a nameless file's in `folder`, which the system can take out of memory."""
    return partial(_mapped, folder)


def _mapped(folder: Path, shape: Sequence[int], dtype: Any) -> np.ndarray:
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=tuple(shape))


def run(
    session: ort.InferenceSession,
    feeds: Mapping[str, np.ndarray],
    aliases: Sequence[Alias] = (),
    empty: Empty = np.empty,
) -> list[np.ndarray]:
    """A graph's outputs, in its order. Outputs that share an input's buffer are written over what was fed."""
    binding, values = session.io_binding(), {}
    for name, array in feeds.items():
        values[name] = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, values[name])
    shared = {alias.output: alias.input for alias in aliases if alias.same_buffer}
    outputs = []
    for output in session.get_outputs():
        source = shared.get(output.name)
        array = empty(output.shape, DTYPES[output.type]) if source is None else feeds[source]
        values[output.name] = ort.OrtValue.ortvalue_from_numpy(array) if source is None else values[source]
        binding.bind_ortvalue_output(output.name, values[output.name])
        outputs.append(array)
    session.run_with_iobinding(binding)
    return outputs


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Largest difference over largest expected magnitude; NaN where either has one."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    return float(np.abs(expected - found).max() / (np.abs(expected).max() or 1.0))
