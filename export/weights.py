"""The weights file: each weight that a graph needs, once, made from the checkpoint tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from stillgraph.exporter.ir.fold_weights import Tensors, Weight, unrounded
from stillgraph.manifest import File, Weights
from stillgraph.page_cache import read_in
from stillgraph.weight_tensor import WeightTensor

WEIGHTS_FILE = "weights.data"
ALIGNMENT = 4096  # a page, so that each tensor can be mapped by itself


def layout(
    weights: Iterable[Weight], start: int = 0, known: Mapping[str, WeightTensor] | None = None
) -> dict[str, WeightTensor]:
    """Where each weight goes in a file whose first `start` bytes are taken, with the weights `known`.

    One page-aligned place for each content: weights of the same bytes share it.
    """
    known = known or {}
    tensors, end = dict[str, WeightTensor](), start
    places = {name: place.offset for name, place in known.items()}
    # What is made of one quantization has names with one start, so it comes in one row.
    for weight in sorted(weights, key=lambda weight: weight.name):
        if weight.content not in places:
            places[weight.content] = -(-end // ALIGNMENT) * ALIGNMENT
            end = places[weight.content] + weight.nbytes
        tensors[weight.name] = WeightTensor(
            offset=places[weight.content],
            nbytes=weight.nbytes,
            dtype=weight.dtype.name,
            shape=weight.shape,
            **vars(weight.origin),
        )
    return tensors


def write(
    folder: Path,
    weights: Sequence[Weight],
    tensor: Callable[[str], torch.Tensor],
    former: Weights | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
    rounded: Callable[[str, Any], Any] = unrounded,
) -> Weights:
    """Add the weights that `former` lacks to the folder's weights file, one at a time.

    The file of `former`, if given, must already be a private copy in `folder`. rounded: see `Tensors`.
    advance is called with the bytes written. Peak memory is that of the largest weight, as read and as
    written; of a quantized one, its codes and a part.
    """
    path = folder / WEIGHTS_FILE
    known = dict(former.tensors) if former else {}
    missing = {weight.name: weight for weight in weights if weight.name not in known}
    if former is not None and not missing:
        return former
    placed = layout(missing.values(), path.stat().st_size if former else 0, known)
    digest = hashlib.sha256()
    if former:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    tensors = Tensors(tensor, rounded)
    with path.open("ab") as stream:
        for name, place in placed.items():
            if place.offset < stream.tell():
                continue  # its bytes are there, under another name
            padding = b"\0" * (place.offset - stream.tell())
            content = missing[name].make(tensors).reshape(-1).view(np.uint8).data
            for part in (padding, content):
                digest.update(part)
                stream.write(part)
            advance(place.nbytes)
    size, sums = path.stat().st_size, read_in(path)
    file = File(path=WEIGHTS_FILE, nbytes=size, sha256=digest.hexdigest(), page_sums=sums)
    return Weights(file=file, tensors=known | placed)


def save_graph(model: ir.Model, weights: Weights, path: Path) -> ir.Model:
    """Write a graph whose weights are inputs; in the file, and in what is returned, they are initializers
    that point into the weights file. The model stays as it is."""
    written = model.clone()
    graph = written.graph
    for value in list(graph.inputs):
        place = weights.tensors.get(value.name or "")
        if place is None:
            continue
        graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            weights.file.path,
            place.offset,
            place.nbytes,
            ir.DataType[place.dtype],
            shape=ir.Shape(place.shape),
            name=value.name or "",
        )
        graph.initializers.add(value)
    ir.save(written, path)
    return written


def load_graph(path: Path) -> ir.Model:
    """Read a graph that `save_graph` wrote: its weights are inputs, and the weights file is not opened."""
    model = ir.load(path)
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return model
