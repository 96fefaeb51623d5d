"""How far apart two logits, or two caches, are. Shapes: V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillgraph.spec import Frozen


@dataclass(frozen=True)
class Magnitudes:
    """The mean square and the largest magnitude of each of n vectors, or of their errors: float64 [n]."""

    squares: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, axes: int | tuple[int, ...] = -1) -> Magnitudes:
        """Over `axes`, those of one vector; what is left is n, in any shape."""
        wide = np.abs(vectors.astype(np.float64))
        return cls(np.square(wide).mean(axes), wide.max(axes))

    @classmethod
    def join(cls, parts: Sequence[Magnitudes]) -> Magnitudes:
        """The vectors of all parts, one after another: [n] each."""
        squares, largest = ([getattr(part, name) for part in parts] for name in ("squares", "largest"))
        return cls(np.concatenate(squares), np.concatenate(largest))

    def over(self, truth: Magnitudes) -> tuple[float, float]:
        """Of errors: their RMS over that of the truth, and the largest over the largest magnitude of it."""
        rms = math.sqrt(self.squares.mean() / truth.squares.mean())
        return rms, float(self.largest.max() / truth.largest.max())

    def largest_over(self, truth: Magnitudes) -> float:
        """Of errors: the RMS of the vector that has most, over the truth's RMS."""
        return math.sqrt(self.squares.max() / truth.squares.mean())

    def at(self, index: tuple[int, slice] | int | slice) -> Magnitudes:
        """Of some of the vectors, [m]."""
        return Magnitudes(np.atleast_1d(self.squares[index]), np.atleast_1d(self.largest[index]))


class Comparison(Frozen):
    """Logits of one row at one position, against the reference. kl in nats, from the reference."""

    row: int
    position: int
    max_error: float
    mean_error: float
    relative_error: float
    kl: float
    top1_equal: bool


class Divergence(Frozen):
    """Logits at one position against those of the checkpoint's own weights, which are others.

    kl, nll in nats, kl from the checkpoint; nll of the text's next token.
    """

    kl: float
    top1_equal: bool
    nll: float
    original_nll: float


def compare(row: int, position: int, reference: np.ndarray, found: np.ndarray) -> Comparison:
    """Measure logits [V] against the reference's. relative_error: max |difference| over max |reference|."""
    difference = np.abs(found - reference)
    return Comparison(
        row=row,
        position=position,
        max_error=float(difference.max()),
        mean_error=float(difference.mean()),
        relative_error=float(difference.max() / np.abs(reference).max()),
        kl=kl_divergence(log_softmax(reference), log_softmax(found)),
        top1_equal=bool(reference.argmax() == found.argmax()),
    )


def diverge(original: np.ndarray, found: np.ndarray, token: int) -> Divergence:
    """Measure logits [V] against those of the checkpoint; token: the one that comes next in the text."""
    original_log, found_log = log_softmax(original), log_softmax(found)
    return Divergence(
        kl=kl_divergence(original_log, found_log),
        top1_equal=bool(original.argmax() == found.argmax()),
        nll=-float(found_log[token]),
        original_nll=-float(original_log[token]),
    )


def kl_divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """KL divergence in nats from log-probabilities [V]; rounding may bring it below 0, which it cannot be."""
    return float(np.maximum(0.0, np.sum(np.exp(reference) * (reference - found))))  # NaN stays NaN


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: np.ndarray = wide - np.log(np.exp(wide).sum())
    return result


def cache_error(reference: np.ndarray, found: np.ndarray) -> float:
    """Largest difference of two key or value blocks, relative to the largest magnitude of the reference."""
    return float(np.abs(found - reference).max() / np.abs(reference).max())
