"""The exporter's table of ONNX functions, made once a process instead of once a graph."""

from __future__ import annotations

import functools

from torch.onnx._internal.exporter._registration import ONNXRegistry

from stillgraph.patches.patch import Patch

# Its source of 500 functions is parsed again by each call: a second, a quarter of a small trace.
made_once = functools.cache(ONNXRegistry.from_torchlib)

TORCHLIB_REGISTRY = Patch(
    name="torchlib_registry",
    target=f"{ONNXRegistry.__module__}:{ONNXRegistry.__qualname__}.from_torchlib",
    signature=("opset_version",),
    replacement=functools.partial(made_once),  # a function would be bound: it is called on an instance
    reason="parses the source of 500 ONNX functions for every graph, though the table is only read",
    upstream="https://github.com/pytorch/pytorch/blob/main/torch/onnx/_internal/exporter/_registration.py",
    remove_when="torch keeps the table between two exports",
)
