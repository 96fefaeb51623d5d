"""The report of a validation: its cases, every bound that is broken, and tables of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich.table import Table

from stillgraph.exporter.validate.gates import Check, Gate
from stillgraph.exporter.validate.kinds import Kind, Peak, TokenizerCount
from stillgraph.exporter.validate.metrics import Comparison
from stillgraph.manifest import Quality, Validation
from stillgraph.spec import Frozen

TextKind = Literal["random", "text", "picture"]


class Agreement(Frozen):
    """How logits of graphs that round their inputs agree with PyTorch, over all positions of a plan.

    A single prompt says little: a first token of massive activations leaves all others few of the 8 bits.
    """

    text: TextKind
    optimized: bool
    int8_activations: bool
    positions: int
    kl: float
    top1_agreement: float
    checks: tuple[Check, ...]

    @property
    def title(self) -> str:
        return _title(self.text, self.optimized, self.int8_activations) + f", {self.positions} positions"


class CaseResult(Frozen):
    """One prompt and the decode steps after it. cache_errors: per layer, the worst relative to the largest
    value; checks: all broken ones, and the nearest to its bound of each kind, worst first; feature_error: of
    the features of the text's picture; int8_activations: whether it is of the prefill that rounds them;
    as_written: whether onnx evaluated each op in the numbers that it names; given: how a graph of growing
    lengths was driven, in words."""

    text: TextKind
    optimized: bool
    start: Literal["prefill", "reference cache"]
    prompt: int
    comparisons: tuple[Comparison, ...]
    cache_errors: tuple[float, ...]
    checks: tuple[Check, ...]
    feature_error: float | None = None
    int8_activations: bool = False
    as_written: bool = False
    given: str = ""

    @property
    def title(self) -> str:
        if self.as_written:
            return f"{self.text} ids, as written, prompt {self.prompt}"
        given = f" {self.given}" if self.start == "prefill" else " from given keys and values"
        title = _title(self.text, self.optimized, self.int8_activations)
        return f"{title}, prompt {self.prompt}{given}".rstrip()

    @property
    def worst(self) -> Comparison:
        return max(self.comparisons, key=lambda comparison: _nan_last(comparison.relative_error))


def agree(cases: Sequence[CaseResult], gate: Gate) -> Agreement:
    """Of the cases of one plan."""
    comparisons = [comparison for case in cases for comparison in case.comparisons]
    kl = float(np.mean([comparison.kl for comparison in comparisons]))
    agreement = float(np.mean([comparison.top1_equal for comparison in comparisons]))
    return Agreement(
        text=cases[0].text,
        optimized=cases[0].optimized,
        int8_activations=cases[0].int8_activations,
        positions=len(comparisons),
        kl=kl,
        top1_agreement=agreement,
        checks=gate.logits(kl, 1 - agreement, len(comparisons)),
    )


class Parity(Frozen):
    """The report of a validation: `reports/parity.json`."""

    date: str
    depth: str
    why_bound: str
    tools: dict[str, str]
    graphs: dict[str, str]
    weights: str
    cases: tuple[CaseResult, ...]
    cpu: str = ""
    agreements: tuple[Agreement, ...] = ()
    quality: Quality | None = None
    kinds: tuple[Kind, ...] = ()
    tokenizer: TokenizerCount | None = None
    peaks: tuple[Peak, ...] = ()

    @property
    def max_relative_error(self) -> float:
        return worst_of([case.worst.relative_error for case in self.cases]) or 0.0

    @property
    def max_cache_error(self) -> float:
        return worst_of([error for case in self.cases for error in case.cache_errors]) or 0.0

    @property
    def top1_agreement(self) -> float:
        return float(np.mean([c.top1_equal for case in self.cases for c in case.comparisons]))

    @property
    def passed(self) -> bool:
        tokenized = self.tokenizer is None or self.tokenizer.passed
        return not self.broken and tokenized and (self.quality is None or self.quality.passed)

    @property
    def checks(self) -> list[tuple[str, Check]]:
        """Every check and of what it is, the worst first."""
        found = [(case.title, check) for case in self.cases for check in case.checks]
        found += [(whole.title, check) for whole in self.agreements for check in whole.checks]
        found += [(peak.module, peak.check) for peak in self.peaks]
        return sorted(found, key=lambda pair: -pair[1].ratio)

    @property
    def broken(self) -> list[tuple[str, Check]]:
        """Every check that does not hold, the worst first."""
        return [pair for pair in self.checks if not pair[1].holds]

    @property
    def worst_ratio(self) -> float:
        """The largest of all errors over their bounds."""
        return max((check.ratio for _, check in self.checks), default=0.0)

    def summary(self) -> dict[str, object]:
        """What a script needs, for one JSON line."""
        errors = {"max_cache_error": self.max_cache_error, "max_feature_error": self.max_feature_error}
        return self.validation().model_dump() | errors

    @property
    def max_feature_error(self) -> float | None:
        """None where no case has a picture."""
        return worst_of([case.feature_error for case in self.cases if case.feature_error is not None])

    def validation(self) -> Validation:
        return Validation(
            passed=self.passed,
            date=self.date,
            cases=len(self.cases),
            max_relative_error=self.max_relative_error,
            worst_ratio=self.worst_ratio,
            top1_agreement=self.top1_agreement,
            quality=self.quality,
        )

    def problem(self) -> str | None:
        """The worst of what broke a bound, in a sentence; None where none is broken."""
        if broken := self.broken:
            title, worst = broken[0]
            more = f", and {len(broken) - 1} more bounds are broken" if len(broken) > 1 else ""
            return f"{worst} is over the bound of {worst.bound:.1e} ({title}){more}"
        if self.quality is not None and not self.quality.passed:
            ratio = self.quality.perplexity / self.quality.original_perplexity
            return (
                f"quantized weights cost a KL divergence of {self.quality.kl:.2e} (bound"
                f" {self.quality.kl_bound:.1e}) and {ratio:.3f} of the perplexity (bound"
                f" {self.quality.perplexity_bound})"
            )
        if self.tokenizer is not None and not self.tokenizer.passed:
            return f"of the tokenizer's corpus {self.tokenizer} are as in transformers"
        return None

    def tables(self) -> list[Table]:
        """The cases, what is broken, what is said of logits as a whole, and what quantized weights cost."""
        tables = [self.table()]
        if self.broken:
            tables.append(broken_table(self.broken))
        if self.agreements:
            tables.append(agreement_table(self.agreements))
        return tables if self.quality is None else [*tables, quality_table(self.quality)]

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
        """Whether a case is within its bounds; a NaN is not."""
        return all(check.holds for check in case.checks)


BROKEN_COLUMNS = ("case", "of", "layer", "position", "row", "measure", "error", "bound", "error / bound")


def broken_row(title: str, check: Check) -> list[str]:
    """A broken bound as the cells of `BROKEN_COLUMNS`."""
    places = ["" if place is None else f"{place}" for place in (check.layer, check.position, check.row)]
    numbers = [f"{check.value:.1e}", f"{check.bound:.1e}", f"{check.ratio:.3g}"]
    return [title, check.what, *places, check.measure, *numbers]


def broken_table(broken: Sequence[tuple[str, Check]]) -> Table:
    """One line a bound that is broken, the worst first."""
    table = Table(*BROKEN_COLUMNS, title=f"{len(broken)} broken bounds, the worst first")
    for title, check in broken:
        table.add_row(*broken_row(title, check))
    return table


AGREEMENT_COLUMNS = ("logits of", "mean KL, nats", "bound", "top-1 agreement", "bound")


def agreement_row(found: Agreement) -> list[str]:
    """What is said of a plan's logits as the cells of `AGREEMENT_COLUMNS`."""
    bounds = {check.measure: check.bound for check in found.checks}
    kl, misses = bounds["mean KL"], bounds["top-1 misses"]
    return [found.title, f"{found.kl:.1e}", f"{kl:.1e}", f"{found.top1_agreement:.1%}", f"{1 - misses:.1%}"]


def agreement_table(agreements: Sequence[Agreement]) -> Table:
    """How graphs that round their inputs agree with PyTorch, and the bounds."""
    table = Table(*AGREEMENT_COLUMNS, title="logits against PyTorch with the same weights")
    for found in agreements:
        table.add_row(*agreement_row(found))
    return table


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
    prompt += " (int8)" if case.int8_activations else f" {case.given}".rstrip()
    how = "as written" if case.as_written else "on" if case.optimized else "off"
    return [
        case.text, how, prompt, f"{len(case.comparisons) // rows - 1}",
        f"{worst.max_error:.1e}", f"{np.mean([c.mean_error for c in case.comparisons]):.1e}",
        f"{worst.relative_error:.1e}", f"{max(c.kl for c in case.comparisons):.1e}", f"{agreement:.0%}",
        f"{worst.position}", f"{max(case.cache_errors):.1e}" if case.cache_errors else "",
        "" if case.feature_error is None else f"{case.feature_error:.1e}",
    ]  # fmt: skip


def _title(text: TextKind, optimized: bool, int8_activations: bool) -> str:
    prefill = ", int8 prefill" if int8_activations else ""
    return f"{text} ids, optimizations {'on' if optimized else 'off'}{prefill}"


def worst_of(values: Sequence[float]) -> float | None:
    """The largest, a NaN before all others; None of none."""
    return max(values, key=_nan_last, default=None)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
