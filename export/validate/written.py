"""Evaluate a bundle's graphs as they are written: each op by onnx's reference, in the numbers that it names.

ONNX Runtime on a CPU drops the casts around fp16 products, with optimizations or without, so that what is
infinite on an NPU or a GPU is finite there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from stillgraph.exporter.validate.driver import GraphRun, Runnable
from stillgraph.manifest import GraphEntry


class MatMul(OpRun):  # type: ignore[misc]
    """onnx's own, by BLAS: sums of fp16 products are rounded to fp16 once, as numpy's slow loop does."""

    def _run(self, a: Any, b: Any) -> tuple[Any]:
        if a.dtype != np.float16:
            return (np.matmul(a, b),)
        with np.errstate(over="ignore", invalid="ignore"):
            return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.float16),)


class WrittenRun(GraphRun):
    """As `GraphRun`, by onnx's reference."""

    def load(self, graph: GraphEntry) -> Runnable:
        evaluator = ReferenceEvaluator(str(self.bundle / graph.file.path), new_ops=[MatMul])

        def call(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with np.errstate(over="ignore", invalid="ignore"):
                return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))

        return call
