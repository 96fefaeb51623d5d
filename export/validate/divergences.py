"""Statistics of how a graph's distributions differ from the checkpoint's.

Names, formulas and standard errors are those of llama.cpp (tools/perplexity/perplexity.cpp): positions count
as independent draws. n: positions, each with a next token of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from stillgraph.exporter.validate.metrics import Divergence
from stillgraph.spec import Frozen

NORMAL_95 = 1.959963984540054  # standard deviations of a normal distribution that hold 95 % of it
PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0)
DELTA, PLUS_MINUS = "\u0394", "\u00b1"


class Estimate(Frozen):
    """A mean, or a function of one, and its standard error."""

    value: float
    error: float


class Statistics(Frozen):
    """Of n positions. KL in nats, probabilities between 0 and 1.

    kl_percentiles: by percent; same_top: share of positions whose best token is the checkpoint's, with its
    95 % interval by Wilson; p_change: of the probability of the text's token, its mean and its RMS;
    perplexity, original_perplexity: of the text, by the graph and by the checkpoint; correlation: of the log
    probabilities of both; log_ratio, ratio: of both perplexities.
    """

    positions: int
    perplexity: Estimate
    original_perplexity: Estimate
    correlation: float
    log_ratio: Estimate
    ratio: Estimate
    kl: Estimate
    kl_max: float
    kl_percentiles: dict[float, float]
    p_change: Estimate
    p_change_rms: Estimate
    same_top: Estimate
    same_top_interval: tuple[float, float]

    def lines(self) -> Iterator[tuple[str, str]]:
        """llama.cpp's names and values in its order; KL below 1e-4 with an exponent, which it rounds away."""
        yield "Mean PPL(Q)", _plain(self.perplexity)
        yield "Mean PPL(base)", _plain(self.original_perplexity)
        yield "Cor(ln(PPL(Q)), ln(PPL(base)))", f"{self.correlation:.2%}".replace("%", " %")
        yield "Mean ln(PPL(Q)/PPL(base))", _plain(self.log_ratio)
        yield "Mean PPL(Q)/PPL(base)", _plain(self.ratio)
        yield "Mean KLD", _plain(self.kl)
        yield "Maximum KLD", _number(self.kl_max)
        for percent, value in self.kl_percentiles.items():
            yield "Median KLD" if percent == 50 else f"{percent:.1f}% KLD", _number(value)
        yield f"Mean {DELTA}p", _percent(self.p_change)
        yield f"RMS {DELTA}p", _percent(self.p_change_rms)
        yield "Same top p", _percent(self.same_top)
        low, high = self.same_top_interval
        yield "Same top p, 95 % of Wilson", f"{100 * low:.2f} to {100 * high:.2f} %"


def summarize(divergences: Sequence[Divergence]) -> Statistics:
    """Statistics of positions that have a next token."""
    kl, loss, original, same = (
        np.array([getattr(one, name) for one in divergences], np.float64)
        for name in ("kl", "nll", "original_nll", "top1_equal")
    )
    change = np.exp(-loss) - np.exp(-original)
    squares, log_ratio = mean(np.square(change)), mean(loss - original)
    rms = math.sqrt(squares.value)
    return Statistics(
        positions=len(kl),
        perplexity=exponential(mean(loss)),
        original_perplexity=exponential(mean(original)),
        correlation=correlation(loss, original),
        log_ratio=log_ratio,
        ratio=exponential(log_ratio),
        kl=mean(kl),
        kl_max=float(kl.max()),
        kl_percentiles={percent: float(np.percentile(kl, percent)) for percent in PERCENTILES},
        p_change=mean(change),
        p_change_rms=Estimate(value=rms, error=0.5 / rms * squares.error if rms else 0.0),
        same_top=mean(same),
        same_top_interval=wilson(int(same.sum()), len(same)),
    )


def mean(values: np.ndarray) -> Estimate:
    """Of [n], with the standard error s / sqrt(n); 0 of one value.

    Of the difference of two losses this is what llama.cpp computes from two variances and their covariance.
    """
    count = len(values)
    spread = float(values.std(ddof=1)) if count > 1 else 0.0
    return Estimate(value=float(values.mean()), error=spread / math.sqrt(count))


def exponential(log: Estimate) -> Estimate:
    """exp of an estimate; its error by the first derivative."""
    value = float(np.exp(log.value))
    return Estimate(value=value, error=value * log.error)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of [n] each; 1 where one of them does not vary and both are equal, else 0."""
    spreads = float(first.std() * second.std())
    if spreads == 0:
        return float(np.array_equal(first, second))
    return float(np.mean((first - first.mean()) * (second - second.mean())) / spreads)


def wilson(hits: int, count: int, deviations: float = NORMAL_95) -> tuple[float, float]:
    """The interval of a share by Wilson (1927), which stays within 0 and 1 and is not empty at either."""
    share, square = hits / count, deviations**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = deviations / (1 + square / count)
    half *= math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _plain(estimate: Estimate) -> str:
    return f"{_number(estimate.value)} {PLUS_MINUS} {_number(estimate.error)}"


def _number(value: float) -> str:
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.6f}"


def _percent(estimate: Estimate) -> str:
    return f"{_number_percent(estimate.value)} {PLUS_MINUS} {_number_percent(estimate.error)} %"


def _number_percent(value: float) -> str:
    value *= 100
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
