"""What the weights file of a bundle says that quantized weights are: read by numpy, from the manifest alone.

How codes are packed is told by `stillgraph.weight_tensor.WeightTensor`; nothing of `exporter.quantize` is
used, so that a mistake there is not made twice. Shapes: N rows, K columns, L blocks of a row.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from stillgraph.errors import CheckFailed
from stillgraph.manifest import Manifest
from stillgraph.weight_tensor import WeightTensor

# What nearest rounding puts 0.29 steps of its scale from the checkpoint, a calibrated one may put further: it
# makes up for the errors of other columns and of its inputs. MOST_STEPS: of a row, root mean square; the
# worst of SmolLM2-135M has 1.16, of Gemma 3 270M 1.39. MOST_APART: of a block, its distance over that of
# numbers which have nothing to do with each other; the worst have 0.50 and 0.53.
MOST_STEPS = 1.7
MOST_APART = 0.75
TINY = 1e-30  # a block of zeros


class Shipped:
    """The quantized weights of a bundle, mapped."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._tensors = manifest.weights.tensors
        self._bytes = np.memmap(bundle / manifest.weights.file.path, np.uint8, "r")

    def rows(self, name: str, codes: WeightTensor, above: int, original: np.ndarray) -> np.ndarray:
        """What the checkpoint's tensor [N, K] is stored as: the rows of a matrix from `above` on.

        Raises CheckFailed where a block of it is further from the original than rounding puts it.
        """
        found, step = (
            part[above : above + len(original), : original.shape[1]] for part in self.matrix(codes)
        )
        assert codes.block is not None
        check_near(name, found, step, original, codes.block)
        return found

    def matrix(self, codes: WeightTensor) -> tuple[np.ndarray, np.ndarray]:
        """fp32 [N, K] of a tensor of codes in blocks, and the scale of each number; K filled up to L blocks
        where the codes are `packed`."""
        column = "" if codes.layout == "packed" else "column_"
        scales, zeros = self._beside(codes, f"{column}scales"), self._beside(codes, f"{column}zeros")
        assert scales is not None
        assert codes.block is not None
        scale = self._read(scales).view(np.float32).reshape(scales.shape)
        levels, zero = self._codes(codes), None if zeros is None else self._codes(zeros)
        if codes.layout == "packed":
            rows, blocks = scales.shape
            levels = levels.reshape(rows, blocks * codes.block)
            zero = None if zero is None else zero.reshape(rows, -1)[:, :blocks]
        else:
            levels, scale = levels[: math.prod(codes.shape)].reshape(codes.shape).T, scale.T
            if zero is None:  # two's complement: its sign bit is what unsigned codes have reversed
                levels = levels ^ (1 << (codes.bits - 1))
            else:
                zero = zero[: scale.size].reshape(scale.T.shape).T
        offset = np.full(scale.shape, 1 << (codes.bits - 1)) if zero is None else zero
        step, middle = (
            np.repeat(part, codes.block, axis=1)[:, : levels.shape[1]].astype(np.float32)
            for part in (scale, offset)
        )
        return (levels.astype(np.float32) - middle) * step, np.abs(step)

    def _beside(self, codes: WeightTensor, layout: str) -> WeightTensor | None:
        """The tensor of a layout that belongs to the same matrix."""
        bits = 32 if layout.endswith("scales") else codes.bits
        same = codes.sources, codes.changes, codes.block
        return next(
            (
                tensor
                for tensor in self._tensors.values()
                if tensor.layout == layout
                and tensor.bits == bits
                and same == (tensor.sources, tensor.changes, tensor.block)
            ),
            None,
        )

    def _read(self, tensor: WeightTensor) -> np.ndarray:
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def _codes(self, tensor: WeightTensor) -> np.ndarray:
        """uint8: each code, of four bits the lower half of a byte first."""
        stored = self._read(tensor)
        return stored if tensor.bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)


def check_near(name: str, found: np.ndarray, step: np.ndarray, original: np.ndarray, block: int) -> None:
    """Raises CheckFailed where a row of [N, K], or a block of one, is further from the checkpoint's than
    rounding puts it."""

    def energy(values: np.ndarray) -> np.ndarray:  # of blocks
        filled = np.pad(values.astype(np.float64), ((0, 0), (0, -original.shape[1] % block)))
        blocks = filled.reshape(len(found), -1, block)
        total: np.ndarray = np.einsum("rbk,rbk->rb", blocks, blocks)
        return total

    apart = np.sqrt(energy(found - original) / np.maximum(energy(found) + energy(original), TINY))
    row, worst = np.unravel_index(apart.argmax(), apart.shape)
    if not apart[row, worst] <= MOST_APART:
        problem = (
            f"row {row}, block {worst} of {name} is {apart[row, worst]:.2f} as far from the checkpoint's as"
        )
        problem += f" unrelated numbers are, and {MOST_APART} is allowed"
        raise CheckFailed("validate", problem, "please report this bug")
    steps = np.sqrt(np.mean(((found - original) / step) ** 2, axis=-1))
    if not steps.max() <= MOST_STEPS:
        problem = f"row {steps.argmax()} of {name} is {steps.max():.1f} steps from the checkpoint's"
        raise CheckFailed("validate", f"{problem} and {MOST_STEPS} are allowed", "please report this bug")
