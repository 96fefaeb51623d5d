"""Makes and runs bundles. Running one takes numpy, onnxruntime and tokenizers; never torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillgraph.engine import Engine
    from stillgraph.errors import StillgraphError
    from stillgraph.exporter.api import export  # noqa: TID251  # for types: it is imported when it is used
    from stillgraph.loading import load
    from stillgraph.pool import Pool
    from stillgraph.row import Step

__version__ = "0.1.0"
__all__ = ["Engine", "Pool", "Step", "StillgraphError", "__version__", "export", "load"]

HOMES = {
    "Engine": "stillgraph.engine",
    "Pool": "stillgraph.pool",
    "Step": "stillgraph.row",
    "StillgraphError": "stillgraph.errors",
    "export": "stillgraph.exporter.api",
    "load": "stillgraph.loading",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for at its first use: the export needs only the manifest."""
    if name not in HOMES:
        raise AttributeError(f"module 'stillgraph' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
