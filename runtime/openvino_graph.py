"""A graph in OpenVINO, where a graph in ONNX Runtime would be: the same arrays in, the same arrays out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stillgraph.errors import StillgraphError
from stillgraph.manifest import GraphEntry
from stillgraph.session import Array

# Products in fp32, as the bundle is proven, and of activations as they are, whatever the CPU is faster in.
HINTS: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


class OpenVinoGraph:
    """A loaded graph, a `stillgraph.session.Runner`. threads: None for all cores."""

    def __init__(self, path: Path, entry: GraphEntry, threads: int | None) -> None:
        try:
            import openvino
        except ImportError as error:
            problem = f"the backend openvino needs OpenVINO ({error})"
            raise StillgraphError("load graph", problem, "pip install 'stillgraph[openvino]'") from error
        self.entry, self._tensor = entry, openvino.Tensor
        options = HINTS if threads is None else {**HINTS, "INFERENCE_NUM_THREADS": threads}
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", options)
        except Exception as error:  # OpenVINO's exceptions are RuntimeErrors and others
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
            problem = (
                f"OpenVINO cannot load {path} ({said[-1]})"  # the first lines are of its own source files
            )
            raise StillgraphError(
                "load graph", problem, "check the bundle with 'stillgraph inspect'"
            ) from error

    def bind(self, arrays: Mapping[str, Array]) -> Callable[[], None]:
        """A call that reads and writes the arrays' own memory; no input may lie in an output's."""
        request = self._model.create_infer_request()
        for port in self.entry.inputs + self.entry.outputs:
            request.set_tensor(port.name, self._tensor(arrays[port.name], shared_memory=True))

        def call() -> None:
            request.infer()

        return call
