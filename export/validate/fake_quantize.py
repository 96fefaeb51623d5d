"""PyTorch's model with the weights of a quantized bundle, so that a graph's error is the graph's alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from stillgraph.errors import CheckFailed
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.rounding import Format, Quantized, quantize
from stillgraph.exporter.smoothing import SAME, Smoothing, smooth
from stillgraph.exporter.validate.shipped import Shipped
from stillgraph.manifest import Manifest
from stillgraph.weight_tensor import Layout, WeightChange, WeightTensor

BLOCKED: tuple[Layout, ...] = ("packed", "columns", "coarse")  # codes of a matrix in blocks, or of a table
CHANNELS: tuple[Layout, ...] = ("channels",)  # those of one with a scale a row
FEW = 32  # tokens that show whether a model is the same
PART = 1 << 15  # rows of a head that are in fp32 at once
TURN = WeightChange(op="Transpose", argument=(1, 0))


@torch.no_grad()
def dequantize(model: torch.nn.Module, bundle: Path, manifest: Manifest, channels: bool) -> None:
    """Replace each weight that a graph of the bundle reads quantized by what its numbers mean.

    channels: of a graph of int8 activations, which has weights with one scale a channel where there are some.
    The checkpoint's weight is quantized again, in the form that the manifest names, and nothing is read from
    the weights file: a mistake in how it is packed is an error of the graph, as it should be. What was
    calibrated cannot be made again: it is read, by code that packs nothing, and held to lie where rounding
    puts it. Raises CheckFailed where it does not, and where the file has a weight that the model does not.
    """
    shipped = Shipped(bundle, manifest)
    parameters = dict(model.named_parameters())
    for source, stored in stored_as(manifest, channels).items():
        if source not in parameters:
            problem = f"the bundle has a weight {source} that the checkpoint does not have"
            raise CheckFailed("validate", problem, "export the bundle again")
        matrix = parameters[source].T if turned(source, stored) else parameters[source]  # [N, K]
        if is_calibrated(stored, manifest):
            above = sum(len(parameters[name]) for name in stored.sources[: stored.sources.index(source)])
            matrix.copy_(torch.from_numpy(shipped.rows(source, stored, above, matrix.numpy())))
        else:
            rounded = quantize(matrix, form_of(stored, manifest, matrix.shape[1]))
            matrix.copy_(rounded.dequantize())
            if rounded.form.nested:
                assert manifest.quantization is not None
                head = RefinedHead(parameters[source], rounded, manifest.quantization.refine)
                model.set_output_embeddings(head)  # type: ignore[operator]


@torch.no_grad()
def smooth_unchanged(model: Any, tied: str | None, smoothings: Sequence[Smoothing], ids: np.ndarray) -> None:
    """Smooth PyTorch's model as a bundle says, which must leave it the same. ids: int64 [B, N].

    tied: its embedding, where that is its head too. Raises CheckFailed where its logits are others then.
    """
    if not smoothings:
        return
    given = torch.from_numpy(ids[:1, :FEW])
    before = model(input_ids=given).logits
    smooth(model, tied, smoothings)
    apart = (model(input_ids=given).logits - before).abs().max() / before.abs().max()
    if not apart <= SAME:
        problem = f"smoothed weights give another model: its logits move by {apart:.1e} of the largest"
        raise CheckFailed("validate", problem, "export the bundle again")


def is_calibrated(stored: WeightTensor, manifest: Manifest) -> bool:
    """Whether numbers may have been rounded for a text: those of four bits, nothing done to them before."""
    how = manifest.quantization
    return how is not None and how.calibration is not None and _few(stored) and not stored.changes


def stored_as(manifest: Manifest, channels: bool) -> dict[str, WeightTensor]:
    """Each tensor of the checkpoint that is stored quantized, and a tensor that holds codes of it.

    channels: as for `dequantize`.
    """
    found: dict[str, WeightTensor] = {}
    for layouts in (BLOCKED, CHANNELS if channels else ()):
        codes = [stored for stored in manifest.weights.tensors.values() if stored.layout in layouts]
        found |= {source: stored for stored in codes for source in stored.sources}
    return dict(sorted(found.items()))


def turned(source: str, stored: WeightTensor) -> bool:
    """Whether the checkpoint has a column for each row of the matrix that is stored.

    Raises CheckFailed for any other change: it would have to be undone in the model.
    """
    if any(change != TURN for change in stored.changes):
        problem = f"{source} was changed before it was quantized"
        raise CheckFailed("validate", problem, "please report this bug")
    return len(stored.changes) % 2 == 1


def form_of(stored: WeightTensor, manifest: Manifest, columns: int) -> Format:
    """The form of codes of rows of `columns`."""
    if stored.block is None:
        return Format.channel(columns)
    assert manifest.quantization is not None
    plan = StoragePlan(manifest.target, manifest.precision, manifest.quantization)
    form = plan.form("int4" if _few(stored) else "int8", nested=stored.layout == "coarse")
    return replace(form, block=stored.block)


def _few(stored: WeightTensor) -> bool:
    """Whether a weight has four bits; of eight in two halves each tensor has four."""
    return stored.bits == 4 and stored.layout != "coarse"


class RefinedHead(torch.nn.Module):
    """A head whose best scores are of its weights, and the others of what these are without their fine half.

    weight: [N, K], as `rounded` has it; refine: how many of N. A level is rounded to the nearest multiple of
    16, half of it upwards.
    """

    def __init__(self, weight: torch.nn.Parameter, rounded: Quantized, refine: int) -> None:
        super().__init__()
        self.weight, self.refine, self.block = weight, refine, rounded.form.block
        levels = rounded.codes.to(torch.int16) - rounded.form.middle
        self.levels = (torch.floor((levels + 8) / 16) * 16).to(torch.int8)  # of 8 bits: from -128 to 112
        self.scales = rounded.scales

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., N] of hidden [.., K]."""
        columns = self.weight.shape[1]
        parts = zip(torch.split(self.levels, PART), torch.split(self.scales, PART), strict=True)
        scores = torch.cat([linear(hidden, self._values(*part)[:, :columns]) for part in parts], dim=-1)
        best = scores.topk(self.refine).indices
        exact = linear(hidden, self.weight)
        return scores.scatter(-1, best, exact.gather(-1, best))

    def _values(self, levels: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return levels.to(torch.float32) * scales.repeat_interleave(self.block, dim=1)
