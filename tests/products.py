"""Graphs of a few products, made by hand: their weights are taken out and stored as an export stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from stillgraph.exporter import weights
from stillgraph.exporter.ir.fold_weights import Weight, take_out
from stillgraph.exporter.quantize.lower import StoragePlan, lower
from stillgraph.manifest import Weights

Ports = Sequence[ValueInfoProto]


def floats(shapes: Mapping[str, Sequence[int]]) -> list[ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


def unstored(
    nodes: Sequence[NodeProto], inputs: Ports, outputs: Ports, tensors: Mapping[str, Sequence[int]]
) -> tuple[ir.Model, list[Weight]]:
    """tensors: shapes of what stands for the checkpoint's, by name."""
    zeros = [helper.make_tensor(name, TensorProto.FLOAT, s, np.zeros(s)) for name, s in tensors.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, zeros)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model, list[Weight](take_out(model, list(tensors)))


def store(
    made: tuple[ir.Model, list[Weight]],
    plan: StoragePlan,
    tensor: Callable[[str], torch.Tensor],
    folder: Path,
) -> tuple[Path, Weights]:
    """Lower and write a graph of `unstored`; its weights are made of what `tensor` gives by name."""
    model, recipes = made
    written = weights.write(folder, lower(model, recipes, plan), tensor)
    weights.save_graph(model, written, folder / "graph.onnx")
    return folder / "graph.onnx", written
