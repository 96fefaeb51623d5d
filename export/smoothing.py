"""Channels of like size before a product: scales that move from its inputs into its weights.

Inputs that are rounded to 8 bits share a scale, by block or by token, so a large channel makes its neighbors
coarse. Channel j of what makes them is divided by s_j, and column j of the weights that read them multiplied
by it: SmoothQuant (Xiao et al., arXiv 2211.10438). s_j are powers of two, so that nothing is rounded and the
model is the same, bit for bit. Shapes: C channels, N rows of a matrix that reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from stillgraph.exporter.ir.fold_weights import Origin, Tensors, WeightStep
from stillgraph.manifest import Manifest

SUFFIX = "smoothing"  # of the name of its exponents, behind the first source's
SAME = 1e-4  # of the largest number: what a norm that adds to its weight may round


@dataclass(frozen=True)
class Smoothing:
    """Scales of the channels between tensors of a checkpoint, and how a bundle holds them.

    sources: what makes the channels, a norm's weight [C] or a matrix [C, K], and then those that read them,
    [N, C]. exponents: int8 [C], of 2. offset: what a norm adds to its weight before it multiplies.
    """

    sources: tuple[str, ...]
    exponents: Tensor
    offset: float = 0.0

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint as the smoothed model has it: in fp32 where it is another."""
        if name not in self.sources:
            return tensor
        scales, wide = torch.exp2(self.exponents.float()), tensor.to(torch.float32)
        if name != self.sources[0]:
            return wide * scales
        if wide.dim() > 1:
            return wide / scales[:, None]
        return (wide + self.offset) / scales - self.offset

    @property
    def name(self) -> str:
        return f"{self.sources[0]}.{SUFFIX}"

    @property
    def content(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.exponents.shape)

    @property
    def dtype(self) -> ir.DataType:
        return ir.DataType.INT8

    @property
    def nbytes(self) -> int:
        return len(self.exponents)

    @property
    def origin(self) -> Origin:
        changes = (WeightStep("Add", self.offset).described(),) if self.offset else ()
        return Origin(self.sources, changes, 8, "smoothing")

    def make(self, tensors: Tensors) -> np.ndarray:
        found: np.ndarray = self.exponents.numpy()
        return found


def shipped_smoothings(bundle: Path, manifest: Manifest) -> tuple[Smoothing, ...]:
    """What was done to the checkpoint's tensors before a bundle's weights were made of them."""
    found = list[Smoothing]()
    for tensor in manifest.weights.tensors.values():
        if tensor.layout == "smoothing":
            place = bundle / manifest.weights.file.path
            exponents = np.fromfile(place, np.int8, tensor.nbytes, offset=tensor.offset)
            offset = sum(change.argument for change in tensor.changes if isinstance(change.argument, float))
            found.append(Smoothing(tensor.sources, torch.from_numpy(exponents), offset))
    return tuple(found)


def undo_in_table(embedding: nn.Module, smoothing: Smoothing) -> None:
    """Have an embedding [V, C] that is head too, and is smoothed as one, give the rows that it had."""
    embedding.register_buffer("unsmoothed", torch.exp2(-smoothing.exponents.float()), persistent=False)

    def divide(module: Any, _: Any, rows: Tensor) -> Tensor:
        divided: Tensor = rows * module.unsmoothed
        return divided

    embedding.register_forward_hook(divide)


@torch.no_grad()
def smooth(model: Any, tied: str | None, smoothings: Iterable[Smoothing]) -> None:
    """Smooth a model of transformers with all its weights in memory. tied: its embedding, where that is its
    head too."""
    parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    for one in smoothings:
        for name in one.sources:
            parameters[name].copy_(one.applied(name, parameters[name]))
        if tied in one.sources[1:]:
            undo_in_table(model.get_input_embeddings(), one)
