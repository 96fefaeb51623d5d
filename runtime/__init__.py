"""Runs a bundle: numpy, onnxruntime, tokenizers; never torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engine import Engine, Step
    from runtime.loading import load

__all__ = ["Engine", "Step", "load"]


def __getattr__(name: str) -> Any:
    """Import the engine at its first use: the export needs only the manifest."""
    if name not in __all__:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    from runtime import engine, loading

    return getattr(loading if name == "load" else engine, name)
