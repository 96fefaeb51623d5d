"""PyTorch's model with the weights of a quantized bundle, so that a graph's error is the graph's alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import torch

from stillgraph.errors import CheckFailed
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.manifest import Manifest

BLOCKED = ("packed", "columns")  # parts of a weight in blocks, of which each stored one has one
TURNED = ".transpose"  # of a name: a matrix that the checkpoint has with a column for each output
CHANNELS = "channels"  # the part of one with a scale a row


@torch.no_grad()
def dequantize(model: torch.nn.Module, manifest: Manifest, channels: bool) -> None:
    """Replace each weight that a graph of the bundle reads quantized by what its numbers mean.

    channels: of a graph of int8 activations, which has weights with one scale a channel where there are some.
    The checkpoint's weight is quantized again, in the form that the bundle's weights file names, and nothing
    is read from that file: a mistake in how it is packed is an error of the graph, as it should be. Raises
    CheckFailed where the file has a weight that the model does not have.
    """
    matrices: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    matrices |= {f"{name}{TURNED}": p.T for name, p in matrices.items() if p.dim() == 2}
    for name, form in forms(manifest, channels, {name: matrix.shape[1] for name, matrix in matrices.items()}):
        matrices[name].copy_(quantize(matrices[name], form).dequantize())


def forms(manifest: Manifest, of_channels: bool, columns: dict[str, int]) -> Iterator[tuple[str, Format]]:
    """Each quantized tensor of the checkpoint and its form in a graph. columns: of every matrix by name."""
    assert manifest.quantization is not None
    plan = StoragePlan(manifest.target, manifest.precision, manifest.quantization)
    blocked, channels = set[tuple[str, int]](), set[str]()
    for stored in manifest.weights.tensors:
        if (found := re.fullmatch(r"(.+)\.int(\d)\.(\w+)", stored)) is None:
            continue
        name, bits, part = found.groups()
        sources = [".".join(parts) for parts in product(*(part.split("+") for part in name.split(".")))]
        if unknown := set(sources) - set(columns):
            problem = f"the bundle has a weight {min(unknown)} that the checkpoint does not have"
            raise CheckFailed("validate", problem, "export the bundle again")
        if part in BLOCKED:
            blocked |= {(source, int(bits)) for source in sources}
        elif part == CHANNELS and of_channels:
            channels |= set(sources)
    for source, bits in sorted(blocked):
        if source not in channels:
            form = plan.form("int4" if bits == 4 else "int8")
            yield source, form
    for source in sorted(channels):
        yield source, Format.channel(columns[source])
