"""Another form of one of a shipped folder's graphs, over the same weights file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from stillgraph.exporter import weights
from stillgraph.exporter.bundle.needs import of_nodes
from stillgraph.files import describe
from stillgraph.manifest import GraphEntry, Manifest


def rewrite(
    folder: Path, manifest: Manifest, entry: GraphEntry, change: Callable[[ir.Graph], object]
) -> Manifest:
    """Change a graph, and write it without what nothing reads now in the place of its file; the manifest with
    the new one."""
    path = folder / entry.file.path
    model = weights.load_graph(path)
    change(model.graph)
    common.RemoveUnusedNodesPass()(model)
    path.unlink()  # a link into the bundle
    described = of_nodes(weights.save_graph(model, manifest.weights, path))
    changed = entry.model_copy(update={"file": describe(folder, path), **described})
    return manifest.model_copy(update={"graphs": manifest.graphs | {entry.shape.name: changed}})
