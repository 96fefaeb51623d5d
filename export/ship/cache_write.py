"""How a decode writes one token into its cache: ScatterElements, or Where over all slots.

A scatter can be done in place, and some runtimes get it wrong; a Where is right in all and writes every slot.
Shapes: B rows, C cache slots, KV key/value heads, D head size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from stillgraph.exporter.ship.rewrite import rewrite
from stillgraph.exporter.targets import CacheWrite
from stillgraph.manifest import GraphEntry, Manifest

SCATTER = "ScatterElements"


def rewrite_cache_write(folder: Path, manifest: Manifest, wanted: CacheWrite) -> Manifest:
    """Give the decode of a bundle's folder the form that is wanted; the manifest with its new file."""
    entry = manifest.graph("decode")
    if wanted == SCATTER or entry is None:
        return manifest
    return rewrite(folder, manifest, entry, lambda graph: to_where(graph, entry))


def to_where(graph: ir.Graph, entry: GraphEntry) -> int:
    """Replace each ScatterElements that writes a token at `past_length`; how many there were.

    Where(slot == past_length, new [B, KV, 1, D], past [B, KV, C, D]).
    """
    found = [node for node in graph if node.op_type == SCATTER]
    if not found:
        return 0
    name = entry.input("past_length").name
    length = next(value for value in graph.inputs if value.name == name)
    four = _constant(graph, "cache_write.shape", np.array([-1, 1, 1, 1]))
    reshaped = ir.Node("", "Reshape", [length, four], name="cache_write.reshape")
    graph.insert_before(found[0], reshaped)
    masks = dict[int, ir.Value]()
    for node in found:
        past, _, new = node.inputs
        assert past is not None
        assert past.shape is not None
        slots = int(past.shape[2])  # type: ignore[arg-type]
        if slots not in masks:
            counted = _constant(graph, f"cache_write.slots.{slots}", np.arange(slots).reshape(1, 1, -1, 1))
            equal = ir.Node("", "Equal", [counted, reshaped.outputs[0]], name=f"cache_write.equal.{slots}")
            graph.insert_before(node, equal)
            masks[slots] = equal.outputs[0]
        where = ir.Node("", "Where", [masks[slots], new, past], name=f"{node.name}.where")
        written, former = where.outputs[0], node.outputs[0]
        graph.insert_before(node, where)
        written.name, written.type, written.shape = former.name, former.type, former.shape
        ir.convenience.replace_all_uses_with(former, written, replace_graph_outputs=True)
        graph.remove(node, safe=False)
    return len(found)


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array.astype(np.int64), name=name)
    value = ir.Value(
        name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(array.shape)
    )
    graph.initializers[name] = value
    return value
