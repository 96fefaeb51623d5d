"""Traces that all tests share: a trace is most of an export's time, and the same whatever the weights are.

It is made once for both processes of a run, and kept beside their temporary folders. A test that changes what
a trace comes from is marked `fresh_traces`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

BUILD = "stillgraph.exporter.bundle.build"
NEIGHBORS = {"k_proj": "q_proj", "v_proj": "k_proj", "up_proj": "gate_proj"}


class Shared:
    """`trace.tracing.convert`, with its results kept as files of the folder."""

    def __init__(self, convert: Callable[..., Any], folder: Path) -> None:
        self.convert, self.folder, self.fresh = convert, folder, False

    def __call__(
        self,
        checkpoint: Any,
        shape: Any,
        target: Any,
        precision: Any,
        kept_fp32: Any = (),
        alike: Callable[[str], Any] = lambda name: None,
    ) -> Any:
        import onnx_ir as ir

        from stillgraph.exporter.targets import TARGETS
        from stillgraph.exporter.trace.tracing import _patches

        def trace() -> Any:
            options = {"kept_fp32": kept_fp32, "alike": alike}
            return self.convert(checkpoint, shape, target, precision, **options)

        if self.fresh:
            return trace()
        # All that `convert` takes from a target and a precision: codes and layouts are decided after it.
        patches = _patches(checkpoint, shape, target, precision)
        of = {
            "model": [str(checkpoint.family.build), _built(checkpoint.config.to_dict()), checkpoint.tied],
            "shape": shape.model_dump(),
            "opset": TARGETS[target].opset,
            "patches": [patch.name for patch in patches],
            "kept_fp32": sorted(kept_fp32),
            "apart": _apart(checkpoint.tensors, alike),
        }
        key = hashlib.sha256(json.dumps(of, default=str, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{key}.onnx"
        if not path.is_file():
            own = path.with_suffix(f".{os.getpid()}")
            ir.save(trace(), own)
            own.replace(path)
        return ir.load(path)


def _apart(names: Iterable[str], alike: Callable[[str], Any]) -> list[str]:
    """Weights that are not alike with the one before them, whose product they may share."""
    pairs = [
        (name.replace(own, before), name)
        for name in names
        for own, before in NEIGHBORS.items()
        if f".{own}." in name
    ]
    return sorted(name for before, name in pairs if alike(before) != alike(name))


def _built(config: Any) -> Any:
    """A config without the spread of weights that tests draw."""
    if not isinstance(config, dict):
        return config
    return {name: _built(value) for name, value in config.items() if name != "initializer_range"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Torch is imported for those alone that export."""
    if BUILD not in sys.modules and "tiny_bundle" not in getattr(item, "fixturenames", ()):
        return
    build: Any = importlib.import_module(BUILD)
    if not isinstance(build.convert, Shared):
        factory: pytest.TempPathFactory = item.config._tmp_path_factory  # type: ignore[attr-defined]
        base = factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
        folder.mkdir(exist_ok=True)
        build.convert = Shared(build.convert, folder)
    build.convert.fresh = item.get_closest_marker("fresh_traces") is not None
