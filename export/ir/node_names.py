"""Name each node after the module it belongs to: what a profile of the graph is read by.

Names are all that ONNX Runtime's profiler reports of a node besides its op, and its optimizer gives a fused
node the name of one of those that it replaces. A name is `layers.3.mlp.down_proj/node_linear_27`: the module
as the decoder calls it, a slash, and what tells the node from others.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # of torch's exporter: the modules around a node, and its own name
WRAPPER = "model."  # the attribute of our module that holds the model; the model calls its decoder so too
PARTS = ("language_model.", "vision_tower.encoder.")  # of a model that takes pictures, around layers


def name_by_module(model: ir.Model) -> None:
    """Put its module before the name of each node of a trace; one outside the decoder keeps its name."""
    for node in model.graph:
        if module := _traced_module(node):
            node.name = f"{module}/{node.name}"


def name_after(former: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Number the nodes that replace a node, by its name; where it has no name the graph names them."""
    for index, node in enumerate(nodes if former.name else ()):
        node.name = f"{former.name}/{node.op_type}_{index}"


def name_the_rest(model: ir.Model) -> None:
    """Give the nodes that a simplification made, which have no module, the place of their neighbors.

    That is the place (`layers.3`, `norm`) of the first input that has one, else the one place where all their
    results are read. What several layers read, such as a mask, keeps its name. Names stay unique.
    """
    for node in model.graph:
        inputs = (value.producer() for value in node.inputs if value is not None)
        _put(node, next(filter(None, map(place, inputs)), ""))
    for node in reversed(model.graph):
        readers = {place(reader) for value in node.outputs for reader, _ in value.uses()}
        _put(node, readers.pop() if len(readers) == 1 else "")


def place(node: ir.Node | None) -> str:
    """The layer, as `layers.3`, or the module outside layers that a node belongs to; "" for none."""
    module, slash, _ = ((node.name or "") if node is not None else "").partition("/")
    return ".".join(module.split(".")[:2]) if slash else ""


def _put(node: ir.Node, where: str) -> None:
    if where and not place(node):
        node.name = f"{where}/{node.name or node.outputs[0].name}"


def _traced_module(node: ir.Node) -> str:
    """The innermost module of a node's scopes, a list in Python's notation with the node's own name last."""
    names: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    inner = names[-2] if len(names) > 1 else ""
    if inner == "model.model":
        return ""
    for prefix in (WRAPPER, WRAPPER, *PARTS):
        inner = inner.removeprefix(prefix)
    return inner
