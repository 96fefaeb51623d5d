"""The exporter's lowering to ONNX's ops without a second trace, where nothing has to be replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.onnx._internal.exporter import _decomp, _fx_passes

from stillgraph.patches.patch import Patch

aten = torch.ops.aten
# What eager code leaves in a graph that computes nothing: the exporter's own table lowers it to the same.
COPIES = {aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}
SAME_OP = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}
CHECKS = {aten._assert_scalar.default, aten._assert_tensor_metadata.default}  # the next pass removes them
PADDING = 4  # its place among the arguments of a convolution

decompose_with_registry = _fx_passes.decompose_with_registry


def lowered(exported_program: Any, registry: Any) -> Any:
    """As `decompose_with_registry`, which does it where an op is in place or has no ONNX function."""
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    nodes = [node for node in exported_program.graph.nodes if node.op == "call_function"]
    if not all(_is_simple(node, known) for node in nodes):
        return decompose_with_registry(exported_program, registry)
    for node in nodes:
        _lower(node)
    return exported_program


def _is_simple(node: Node, known: set[Any]) -> bool:
    op = node.target
    if op in COPIES or op in CASTS or op in SAME_OP or op in CHECKS or _is_unpadded(node):
        return True
    schema = getattr(op, "_schema", None)
    return op in known and not (schema and schema.is_mutable)


def _is_unpadded(node: Node) -> bool:
    """Whether a convolution names no padding, which is to have none. SigLIP's is one."""
    return node.target == aten.conv2d.padding and len(node.args) <= PADDING and not node.kwargs


def _lower(node: Node) -> None:
    if node.target in SAME_OP:
        node.target = SAME_OP[node.target]
    elif _is_unpadded(node):
        node.target = aten.conv2d.default
    elif node.target in COPIES or node.target in CASTS:
        source: Any = node.args[0]
        dtype = node.meta["val"].dtype
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
        else:
            node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}


DIRECT_LOWERING = Patch(
    name="direct_lowering",
    target=f"{_fx_passes.__name__}:decompose_with_registry",
    signature=("exported_program", "registry"),
    replacement=lowered,
    reason="traces every graph a second time, half of the time or more, to replace ops without effect",
    upstream="https://github.com/pytorch/pytorch/blob/main/torch/onnx/_internal/exporter/_fx_passes.py",
    remove_when="torch decomposes only what has no ONNX function",
)
