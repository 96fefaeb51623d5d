"""What a graph needs of a runtime, and which weights it reads, from its nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from stillgraph.manifest import GraphEntry, Ops

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
# The first ONNX Runtime that was seen to run each: releases from 1.20 to 1.32 were tried on the nodes of our
# graphs. GroupQueryAttention is older, but not its input query_seqlens and its sliding_window_cache.
OPSETS = {20: "1.20", 21: "1.20", 23: "1.23"}
CUSTOM = {
    (MICROSOFT, "BranchwiseRMSNorm"): "1.31",
    (MICROSOFT, "GatherBlockQuantized"): "1.23",
    (MICROSOFT, "GroupQueryAttention"): "1.32",
    (MICROSOFT, "MatMulIntegerToFloat"): "1.23",
    (MICROSOFT, "MatMulNBits"): "1.23",
}
# Ops that read rows of their first input by the ids in another, and what goes with these rows.
GATHERS = ("Gather", "GatherBlockQuantized")


def of_nodes(model: ir.Model) -> dict[str, Any]:
    """What a GraphEntry says of a graph's nodes: `weights`, `tables` and `ops`."""
    whole, gathered = reads(model)
    return {"weights": whole, "tables": gathered, "ops": needs(model)}


def needs(model: ir.Model) -> Ops:
    """The ops of a graph, by domain, and what runs them."""
    opsets = {domain: version for domain, version in model.graph.opset_imports.items() if version}
    used = {(node.domain, node.op_type) for node in model.graph.all_nodes()}
    custom = {
        domain: tuple(sorted(op for other, op in used if other == domain))
        for domain in sorted({domain for domain, _ in used} - set(STANDARD))
    }
    return Ops(opsets=opsets, custom=custom, onnxruntime=_least(model))


def least_onnxruntime(entries: Iterable[GraphEntry]) -> str | None:
    """The least version that runs all of these graphs; None where that of one is not known."""
    versions = [entry.ops.onnxruntime for entry in entries]
    return None if None in versions else max((v for v in versions if v), key=_numbers, default=None)


def _least(model: ir.Model) -> str | None:
    """The newest of what its opset and its nodes need; None with an op of which that was not measured."""
    found: list[str | None] = [OPSETS.get(model.graph.opset_imports.get("", 0))]
    found += [
        CUSTOM.get((node.domain, node.op_type))
        for node in model.graph.all_nodes()
        if node.domain not in STANDARD
    ]
    return None if None in found else max((v for v in found if v), key=_numbers, default=None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def reads(model: ir.Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weights of the weights file that a graph reads whole, and those of which it gathers rows alone."""
    whole, gathered = list[str](), list[str]()
    for name, value in model.graph.initializers.items():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        ops = {use.node.op_type for use in value.uses()}
        (gathered if ops <= set(GATHERS) else whole).append(name)
    return tuple(whole), tuple(gathered)
