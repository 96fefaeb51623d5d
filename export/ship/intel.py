"""OpenVINO, in Python. The driver makes the cache a state of each graph, from the manifest's aliases."""

from __future__ import annotations

from stillgraph.exporter.ship.python_runtime import PythonRuntime
from stillgraph.exporter.targets import CacheWrite


class OpenVino(PythonRuntime):
    cache_write: CacheWrite = "Where"  # twice as fast there


RUNTIME = OpenVino("openvino", "OpenVINO")
