"""What one case measures on its way through a bundle's graphs, against the reference.

Shapes: B rows, N tokens, KV key/value heads, D head size, V vocabulary, n vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stillgraph.exporter.validate.metrics import Comparison, Magnitudes, cache_error, compare
from stillgraph.exporter.validate.reference import Reference

FEW = 16  # vectors: one of them can make most of their RMS
What = Literal["logits", "keys", "values", "features", "products"]


@dataclass(frozen=True)
class Measured:
    """Errors of n vectors of one kind: logits of positions, a layer's keys of slots, a picture's features.

    rows, positions: int64 [n]; own: PyTorch's own RMS and worst relative error, where they are known: that of
    these vectors or of all of the text, whichever is larger, since theirs may be small by chance. The RMS of
    under `FEW` vectors is up to that of the text's worst: on SmolLM2-135M some have 7 times the text's.
    """

    what: What
    layer: int | None
    rows: np.ndarray
    positions: np.ndarray
    error: Magnitudes
    truth: Magnitudes
    own: tuple[float, float] | None = None


@dataclass(frozen=True)
class Part:
    """Some vectors [n] of one row, from one position on."""

    row: int
    first: int
    error: Magnitudes
    truth: Magnitudes
    own: Magnitudes | None

    @classmethod
    def of(cls, place: tuple[int, int], truth: np.ndarray, found: np.ndarray, own: Magnitudes | None) -> Part:
        """place: row and first position; truth, found: [n, ...]."""
        axes = tuple(range(1, truth.ndim))
        return cls(*place, Magnitudes.of(found - truth, axes), Magnitudes.of(truth, axes), own)

    @property
    def count(self) -> int:
        return len(self.error.squares)


class CaseMeasures:
    """Collects the errors of one case."""

    def __init__(self, truth: Reference) -> None:
        self.truth = truth
        self.comparisons: list[Comparison] = []
        self.feature_error: float | None = None
        self._cache_errors: dict[int, list[float]] = {}  # by layer
        self._parts: dict[tuple[What, int | None], list[Part]] = {}

    def logits(self, row: int, position: int, found: np.ndarray) -> None:
        """Of one row after one position: [V]."""
        truth, own = self.truth.logits[position][row], self.truth.own
        self.comparisons.append(compare(row, position, truth, found))
        spread = own.logits[position].at(row) if own else None
        self._add("logits", None, Part.of((row, position), truth[None], found[None], spread))

    def slots(self, layer: int, row: int, first: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Of a layer's cache: what one row holds from position `first` on, [KV, n, D] each."""
        own, place = self.truth.own, (row, slice(first, first + keys.shape[1]))
        kinds: tuple[tuple[Literal["keys", "values"], np.ndarray], ...] = (("keys", keys), ("values", values))
        for what, found in kinds:
            truth = getattr(self.truth, what)[layer][row, :, place[1]]
            self._cache_errors.setdefault(layer, []).append(cache_error(truth, found))
            spread = getattr(own, what)[layer].at(place) if own else None
            self._add(what, layer, Part.of((row, first), truth.swapaxes(0, 1), found.swapaxes(0, 1), spread))

    def features(self, found: np.ndarray | None) -> None:
        """Of the picture: [T, hidden]; nothing without one."""
        if found is None or self.truth.features is None:
            return
        self.feature_error = cache_error(self.truth.features, found)
        own = self.truth.own.features if self.truth.own else None
        self._add("features", None, Part.of((0, 0), self.truth.features, found, own))

    @property
    def cache_errors(self) -> tuple[float, ...]:
        """Per layer, the worst of keys and values, each relative to the largest of its row."""
        return tuple(float(np.max(errors)) for _, errors in sorted(self._cache_errors.items()))

    def measured(self) -> Iterator[Measured]:
        """All errors, those of one kind and layer together."""
        for (what, layer), parts in self._parts.items():
            truth = Magnitudes.join([part.truth for part in parts])
            yield Measured(
                what=what,
                layer=layer,
                rows=np.concatenate([np.full(part.count, part.row) for part in parts]),
                positions=np.concatenate([part.first + np.arange(part.count) for part in parts]),
                error=Magnitudes.join([part.error for part in parts]),
                truth=truth,
                own=self._own(what, layer, parts, truth),
            )

    def _own(
        self, what: What, layer: int | None, parts: list[Part], truth: Magnitudes
    ) -> tuple[float, float] | None:
        """As `Measured.own`."""
        if self.truth.own is None:
            return None
        here = Magnitudes.join([part.own for part in parts if part.own is not None]).over(truth)
        rms, worst, peak = self.truth.own.whole[what, layer]
        few = truth.squares.size < FEW
        return max(here[0], rms, peak if few else 0.0), max(here[1], worst)

    def _add(self, what: What, layer: int | None, part: Part) -> None:
        self._parts.setdefault((what, layer), []).append(part)
