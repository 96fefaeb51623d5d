"""A bundle of ours, as one contender. See `export/bench/worker.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime

from stillgraph.loading import load
from stillgraph.manifest import Manifest

MB = 1e6


class Ours:
    def __init__(self, request: Any) -> None:
        unload, compiled = (request.options.get(key) == "True" for key in ("unload", "compiled"))
        self.engine = load(request.model, unload_prefill=unload, threads=request.threads, compiled=compiled)
        self.loaded = self.engine.load_seconds
        self.images = [request.image] if request.image else []
        manifest = self.engine.manifest
        self.facts = {
            "versions": {"onnxruntime": onnxruntime.__version__},
            "weights_mb": weights_mb(manifest, Path(request.model), compiled),
            "cache_mb": cache_mb(manifest),
            "read_mb": read_mb(manifest),
        }

    @property
    def swap_seconds(self) -> float:
        return self.engine.load_seconds - self.loaded

    @property
    def vision_seconds(self) -> float:
        return self.engine.vision.seconds if self.engine.vision else 0.0

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        self.engine.reset()
        # Random weights choose stop tokens like any other.
        steps = self.engine.stream(ids, images=self.images, max_new_tokens=count, stop_tokens=())
        return (step.token for step in steps)

    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        return self.engine.logits(ids, start=first)


def weights_mb(manifest: Manifest, bundle: Path, compiled: bool) -> float:
    """The weights file, and with it what 'compile' wrote beside it."""
    made = [path for path in (bundle / "compiled").rglob("*") if path.is_file()] if compiled else []
    return (manifest.weights.file.nbytes + sum(path.stat().st_size for path in made)) / MB


def cache_mb(manifest: Manifest) -> float | None:
    """Keys and values that the decode graph is given; None where they grow."""
    decode = manifest.graph("decode")
    if decode is None:
        return None
    return sum(port.nbytes for port in decode.inputs if port.is_cache) / MB


def read_mb(manifest: Manifest) -> float | None:
    """Weights that a step reads: what the decode graph reads whole, each byte once, of a table none, and of
    the fine half of a head the rows that are refined.

    None without a decode graph.
    """
    decode = manifest.graph("decode") or manifest.graph("dynamic")
    if decode is None:
        return None
    tensors, how = manifest.weights.tensors, manifest.quantization
    read = {tensors[name].offset: tensors[name].nbytes for name in decode.weights}
    fine = [tensors[name] for name in decode.tables if tensors[name].layout == "fine"]
    rows = sum(how.refine * half.nbytes / half.shape[0] for half in fine) if how else 0
    return (sum(read.values()) + rows) / MB


def open_contender(request: Any) -> Ours:
    return Ours(request)
