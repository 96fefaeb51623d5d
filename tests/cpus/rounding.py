"""How a product rounds its activations: kernels of one op do it in different ways, each within its right.

Needs numpy and ONNX Runtime and no more. Shapes as in products.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.cpus.sums import outputs

BLOCK = 128  # of the weights of a case
STEPS = 255  # of a row in KleidiAI, from its smallest activation or 0 to its largest or 0


def rounding(folder: Path) -> str:
    """`by block`, `by row` or `not`: of which of them the product of a case is nearest."""
    feeds, weights, found = outputs(folder)
    x = feeds.astype(np.float64)
    ways = {"not": x, "by block": by_block(x), "by row": by_row(x)}
    return min(ways, key=lambda name: float(np.abs(found - ways[name] @ weights.T).max()))


def by_block(x: np.ndarray) -> np.ndarray:
    """Steps of a block's largest magnitude / 127, as ONNX Runtime's own kernels take them."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.round(blocks / step) * step).reshape(x.shape)


def by_row(x: np.ndarray) -> np.ndarray:
    """255 steps from a row's smallest number, or 0, to its largest, or 0: as Arm's KleidiAI takes them."""
    least = np.minimum(x.min(-1, keepdims=True), 0)
    step = (np.maximum(x.max(-1, keepdims=True), 0) - least) / STEPS
    zero = np.round(-least / step)
    return (np.clip(np.round(x / step) + zero, 0, STEPS) - zero) * step
