"""How far apart two sets of logits, or two caches, are: measures, bounds, and the report of a validation."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from rich.table import Table

from stillgraph.exporter.precisions import ACTIVATION_ROUNDOFF, HALF_ROUNDOFF, PRECISIONS
from stillgraph.exporter.validate.metrics import Comparison
from stillgraph.manifest import Precision, Quality, Validation
from stillgraph.spec import Frozen, ModelSpec

TextKind = Literal["random", "text", "picture"]
SMALLEST_PUBLISHED = 640  # hidden size of the smallest published Gemma 3


class CaseResult(Frozen):
    """One prompt and the decode steps after it. cache_errors: per layer, relative to its largest value;
    feature_error: of the features of the text's picture; bound: what these and the relative errors of logits
    may be; int8_activations: whether it is of the prefill that rounds them."""

    text: TextKind
    optimized: bool
    start: Literal["prefill", "reference cache"]
    bound: float
    prompt: int
    comparisons: tuple[Comparison, ...]
    cache_errors: tuple[float, ...]
    feature_error: float | None = None
    int8_activations: bool = False

    @property
    def errors(self) -> tuple[float, ...]:
        """Each relative error that the bound is for."""
        features = () if self.feature_error is None else (self.feature_error,)
        return (self.worst.relative_error, *self.cache_errors, *features)

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
    quality: Quality | None = None

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
        return all(self.within_bound(case) for case in self.cases) and (
            self.quality is None or self.quality.passed
        )

    def summary(self) -> dict[str, object]:
        """What a script needs, for one JSON line."""
        errors = {"max_cache_error": self.max_cache_error, "max_feature_error": self.max_feature_error}
        return self.validation().model_dump() | errors

    @property
    def max_feature_error(self) -> float | None:
        """None where no case has a picture."""
        errors = [case.feature_error for case in self.cases if case.feature_error is not None]
        return max(errors, key=_nan_last, default=None)

    def validation(self) -> Validation:
        return Validation(
            passed=self.passed,
            date=self.date,
            cases=len(self.cases),
            max_relative_error=self.max_relative_error,
            bound=self.bound,
            top1_agreement=self.top1_agreement,
            quality=self.quality,
        )

    def problem(self) -> str | None:
        """The worst of what broke a bound, in a sentence; None where none is broken."""
        if broken := [case for case in self.cases if not self.within_bound(case)]:
            worst = max((error for case in broken for error in case.errors), key=_nan_last)
            return f"a relative error of {worst:.2e} is over the bound of {broken[0].bound:.1e}"
        if self.quality is not None and not self.quality.passed:
            ratio = self.quality.perplexity / self.quality.original_perplexity
            return (
                f"quantized weights cost a KL divergence of {self.quality.kl:.2e} (bound"
                f" {self.quality.kl_bound:.1e}) and {ratio:.3f} of the perplexity (bound"
                f" {self.quality.perplexity_bound})"
            )
        return None

    def tables(self) -> list[Table]:
        """The cases, and what quantized weights cost where they are."""
        return [self.table()] if self.quality is None else [self.table(), quality_table(self.quality)]

    def table(self) -> Table:
        """One line a case: where it is worst."""
        table = Table(
            title=f"parity with PyTorch: {'passed' if self.passed else 'FAILED'}", caption=self.why_bound
        )
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("ids", "optimized") else "right")
        for case in self.cases:
            table.add_row(*case_row(case), style=None if self.within_bound(case) else "bold red")
        return table

    def within_bound(self, case: CaseResult) -> bool:
        """Whether a case is within the bound; a NaN is not."""
        return all(error <= case.bound for error in case.errors)


def quality_table(quality: Quality) -> Table:
    """What quantized weights cost, and the bounds."""
    ids = "a text" if quality.text else "random ids"
    title = f"the weights' quality over {quality.positions} positions of {ids}"
    table = Table("measure", "this bundle", "checkpoint", "bound", title=title)
    table.add_row("mean KL divergence, nats", f"{quality.kl:.2e}", "0", f"{quality.kl_bound:.1e}")
    table.add_row("top-1 agreement", f"{quality.top1_agreement:.1%}", "100%", "")
    bound = f"{quality.perplexity_bound * quality.original_perplexity:,.3f}" if quality.text else ""
    perplexities = quality.perplexity, quality.original_perplexity
    table.add_row("perplexity", *(f"{value:,.3f}" for value in perplexities), bound)
    if quality.recall is not None:
        table.add_row("recall", f"{quality.recall:.2f}", f"{quality.original_recall:.2f}", "")
    return table


COLUMNS = (
    "ids",
    "optimized",
    "prompt",
    "steps",
    "max",
    "mean",
    "relative",
    "KL",
    "top-1",
    "worst at",
    "cache",
    "features",
)


def case_row(case: CaseResult) -> list[str]:
    """A case as the cells of `COLUMNS`."""
    worst = case.worst
    agreement = np.mean([c.top1_equal for c in case.comparisons])
    rows = 1 + max(c.row for c in case.comparisons)
    prompt = f"{case.prompt}" + ("" if case.start == "prefill" else " (given)")
    prompt += " (int8)" if case.int8_activations else ""
    return [
        case.text, "on" if case.optimized else "off", prompt, f"{len(case.comparisons) // rows - 1}",
        f"{worst.max_error:.1e}", f"{np.mean([c.mean_error for c in case.comparisons]):.1e}",
        f"{worst.relative_error:.1e}", f"{max(c.kl for c in case.comparisons):.1e}", f"{agreement:.0%}",
        f"{worst.position}", f"{max(case.cache_errors):.1e}",
        "" if case.feature_error is None else f"{case.feature_error:.1e}",
    ]  # fmt: skip


def bound(spec: ModelSpec, precision: Precision, rounds: bool = True) -> tuple[float, str]:
    """The relative error that a graph of this precision may have, and in a sentence why.

    rounds: whether the inputs of its products are rounded to 8 bits, where weights are of int8 or int4.
    """
    if PRECISIONS[precision].bits and rounds:
        # The kernels round the input of each product to 8 bits. Errors add as above; 4 is the margin, since
        # those of the first layers go through all others. Without these kernels the graph is exact.
        value = 4 * ACTIVATION_ROUNDOFF * math.sqrt(4 * len(spec.layers) + 1)
        return value, (
            f"bound {value:.1e}: 4 * 2^-8 * sqrt(4 products * {len(spec.layers)} layers + head), inputs are"
            " rounded to 8 bits; with optimizations off they are not, and the bound is that of fp32"
        )
    if precision == "fp16":
        # Each of a layer's 7 products rounds its input, its matrix and its result to fp16. Independent errors
        # add as the root of their number; the largest of V errors has the same ratio to the largest of V
        # logits as one error to one logit. 2 is the margin.
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
