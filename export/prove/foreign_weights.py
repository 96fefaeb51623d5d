"""The matrices that a graph of few bits holds, and PyTorch's model with these in place of its own.

So a graph's error is told apart from what its weights cost, as it is of a bundle. Which weight a matrix is
of is found by its numbers: names differ between exporters. Shapes: N rows (outputs), K columns, G blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from stillgraph.exporter.prove.foreign import FEW_BITS, ForeignGraph

SAMPLE = 8  # rows that tell which weight it is
ALIKE = 0.5  # RMS of a sample's difference over that of the weight: codes have less, another weight 1.4
PACKED = "MatMulNBits"


@torch.no_grad()
def use_weights_of(graph: ForeignGraph, model: Any) -> list[str]:
    """Give the model the matrices of a graph; names of those that are no weight of it.

    Embedding and head become two, since a graph may have few bits for one of them alone.
    """
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    tables, products = [(model.get_input_embeddings().weight,)], list(_products(model))
    unknown = []
    for name, ops, matrix in _matrices(graph.path):
        if matrix is None:
            unknown.append(name)
            continue
        found = torch.from_numpy(matrix)
        known = [tables] * ("Gather" in ops) + [products] * (ops != {"Gather"})
        for fits in ([(_difference(found, parts), parts) for parts in each] for each in known):
            error, parts = min(fits, key=lambda fit: fit[0])
            if error >= ALIKE:
                unknown.append(name)
                continue
            for part, own in zip(parts, torch.split(found, [len(part) for part in parts]), strict=True):
                part.copy_(own)
    return unknown


def _products(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, ...]]:
    """Every matrix of a product, and those of a module that exporters stack: q, k and v; gate and up.

    Each as [N, K], and as [K, N].
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            yield (module.weight,)
            yield (module.weight.T,)
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if all(hasattr(module, name) for name in names):
                yield tuple(getattr(module, name).weight for name in names)


def _difference(found: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> float:
    """Over rows of the first part and of the last; infinite for another shape."""
    if found.shape != (sum(map(len, parts)), parts[0].shape[1]):
        return float("inf")
    ours, own = found[:SAMPLE], parts[0][:SAMPLE]
    if len(parts) > 1:
        ours, own = torch.cat([ours, found[-SAMPLE:]]), torch.cat([own, parts[-1][-SAMPLE:]])
    return float((ours - own).norm() / own.norm())


def _matrices(path: Path) -> Iterator[tuple[str, set[str], np.ndarray | None]]:
    """Each with its name and the ops that read it, as fp32 [N, K] or [K, N], one in memory at a time.

    None for one in another form.
    """
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)

    def array(name: str) -> Any:
        return numpy_helper.to_array(tensors[name], base_dir=str(path.parent))

    for node in graph.node:
        if node.op_type == PACKED:
            sizes = {a.name: a.i for a in node.attribute}
            points = array(node.input[3]) if len(node.input) > 3 and node.input[3] else None
            matrix = unpack(array(node.input[1]), array(node.input[2]), points, sizes)
            yield node.input[1], {PACKED}, matrix
        elif node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            parts = [array(name).astype(np.float32) for name in node.input]
            plain = parts[0].ndim == 2 and parts[1].ndim == 0
            whole = (parts[0] - (parts[2] if len(parts) > 2 else 0)) * parts[1] if plain else None
            yield node.input[0], readers[node.output[0]], whole
        elif FEW_BITS.get(node.op_type):
            yield next((name for name in node.input if name in tensors), node.name), set(), None


def unpack(
    codes: np.ndarray, scales: np.ndarray, points: np.ndarray | None, sizes: dict[str, int]
) -> np.ndarray:
    """The matrix [N, K] of a MatMulNBits: codes uint8 [N, G, bytes], low bits first; scales [N * G]; zero
    points uint8, packed alike by row, or the middle of the codes."""
    rows, columns, bits = sizes["N"], sizes["K"], sizes.get("bits", 4)
    blocks = -(-columns // sizes["block_size"])
    wide = _split(codes.reshape(rows, blocks, -1), bits)  # [N, G, block]
    middle: Any = 1 << (bits - 1)
    if points is not None and points.dtype == np.uint8:
        middle = _split(points.reshape(rows, -1), bits)[:, :blocks, None]
    elif points is not None:
        middle = points.reshape(rows, blocks, 1)
    numbers = (wide - middle) * scales.astype(np.float32).reshape(rows, blocks, 1)
    matrix: np.ndarray = numbers.reshape(rows, -1)[:, :columns].astype(np.float32)
    return matrix


def _split(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes as float32, 8 / bits of each byte, the low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.float32)
