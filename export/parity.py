"""How far apart two sets of logits, or two caches, are: measures, bounds, and the report of a validation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from rich.table import Table

from runtime.manifest import Precision, Validation
from runtime.spec import Frozen, ModelSpec

SMALLEST_PUBLISHED = 640  # hidden size of the smallest published Gemma 3
HALF_ROUNDOFF = 2.0**-11  # of fp16


class Comparison(Frozen):
    """Logits of one row at one position, against the reference. kl in nats, from the reference."""

    row: int
    position: int
    max_error: float
    mean_error: float
    relative_error: float
    kl: float
    top1_equal: bool


class CaseResult(Frozen):
    """One prompt and the decode steps after it. cache_errors: per layer, relative to its largest value."""

    text: Literal["random", "text"]
    optimised: bool
    start: Literal["prefill", "reference cache"]
    prompt: int
    comparisons: tuple[Comparison, ...]
    cache_errors: tuple[float, ...]

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda comparison: _nan_last(comparison.relative_error))


class Parity(Frozen):
    """The report of a validation: `reports/parity.json`."""

    date: str
    depth: str
    bound: float
    why_bound: str
    tools: dict[str, str]
    graphs: dict[str, str]
    weights: str
    cases: tuple[CaseResult, ...]

    @property
    def max_relative_error(self) -> float:
        return max((case.worst.relative_error for case in self.cases), key=_nan_last)

    @property
    def max_cache_error(self) -> float:
        return max((error for case in self.cases for error in case.cache_errors), key=_nan_last, default=0.0)

    @property
    def top1_agreement(self) -> float:
        return float(np.mean([c.top1_equal for case in self.cases for c in case.comparisons]))

    @property
    def passed(self) -> bool:
        return all(self.holds(case) for case in self.cases)

    def summary(self) -> dict[str, object]:
        """What a script wants to know, as it goes into one JSON line."""
        return self.validation().model_dump() | {"max_cache_error": self.max_cache_error}

    def validation(self) -> Validation:
        return Validation(
            passed=self.passed,
            date=self.date,
            cases=len(self.cases),
            max_relative_error=self.max_relative_error,
            bound=self.bound,
            top1_agreement=self.top1_agreement,
        )

    def table(self) -> Table:
        """One line a case: where it is worst."""
        table = Table(
            title=f"parity with PyTorch: {'passed' if self.passed else 'FAILED'}", caption=self.why_bound
        )
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("ids", "optimised") else "right")
        for case in self.cases:
            table.add_row(*case_row(case), style=None if self.holds(case) else "bold red")
        return table

    def holds(self, case: CaseResult) -> bool:
        """Whether a case is within the bound; a NaN is not."""
        errors = (case.worst.relative_error, *case.cache_errors)
        return all(error <= self.bound for error in errors)


COLUMNS = (
    "ids",
    "optimised",
    "prompt",
    "steps",
    "max",
    "mean",
    "relative",
    "KL",
    "top-1",
    "worst at",
    "cache",
)


def case_row(case: CaseResult) -> list[str]:
    """A case as the cells of `COLUMNS`."""
    worst = case.worst
    agreement = np.mean([c.top1_equal for c in case.comparisons])
    rows = 1 + max(c.row for c in case.comparisons)
    prompt = f"{case.prompt}" + ("" if case.start == "prefill" else " (given)")
    return [
        case.text, "on" if case.optimised else "off", prompt, f"{len(case.comparisons) // rows - 1}",
        f"{worst.max_error:.1e}", f"{np.mean([c.mean_error for c in case.comparisons]):.1e}",
        f"{worst.relative_error:.1e}", f"{max(c.kl for c in case.comparisons):.1e}", f"{agreement:.0%}",
        f"{worst.position}", f"{max(case.cache_errors):.1e}",
    ]  # fmt: skip


def compare(row: int, position: int, reference: np.ndarray, found: np.ndarray) -> Comparison:
    """Measure logits [V] against the reference's. relative_error: max |difference| over max |reference|."""
    difference = np.abs(found - reference)
    reference_log, found_log = log_softmax(reference), log_softmax(found)
    return Comparison(
        row=row,
        position=position,
        max_error=float(difference.max()),
        mean_error=float(difference.mean()),
        relative_error=float(difference.max() / np.abs(reference).max()),
        kl=max(0.0, float(np.sum(np.exp(reference_log) * (reference_log - found_log)))),
        top1_equal=bool(reference.argmax() == found.argmax()),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    result: np.ndarray = wide - np.log(np.exp(wide).sum())
    return result


def cache_error(reference: np.ndarray, found: np.ndarray) -> float:
    """Largest difference of two key or value blocks, relative to the largest magnitude of the reference."""
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def bound(spec: ModelSpec, precision: Precision) -> tuple[float, str]:
    """The relative error that a graph of this precision may have, and in a sentence why."""
    if precision == "fp16":
        # Each of a layer's 7 products rounds its input, its matrix and its result to fp16. Independent errors
        # add as the root of their number; the largest of V errors stands to the largest of V logits as one
        # error to one logit. 2 is the margin.
        value = 2 * HALF_ROUNDOFF * math.sqrt(21 * len(spec.layers))
        return (
            value,
            f"bound {value:.1e}: 2 * 2^-11 * sqrt(3 roundings * 7 products * {len(spec.layers)} layers)",
        )
    if spec.hidden_size < SMALLEST_PUBLISHED:
        return 1e-5, "bound 1e-05: fp32 sums in another order, small model"
    return 5e-5, "bound 5e-05: fp32 sums in another order, published geometry"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
