"""Statistics against numbers worked out by hand, and against llama.cpp's own sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stillgraph.exporter.validate.divergences import (
    Estimate,
    Statistics,
    correlation,
    exponential,
    mean,
    summarize,
    wilson,
)
from stillgraph.exporter.validate.metrics import Divergence, diverge


def drawn(count: int = 40) -> list[Divergence]:
    """Positions with losses that vary together, as those of a model and its quantized form do."""
    rng = np.random.default_rng(5)
    original = rng.gamma(2.0, 1.0, count)
    losses = np.abs(original + rng.normal(0.05, 0.2, count))
    kl = rng.gamma(1.0, 0.1, count)
    return [
        Divergence(kl=float(k), top1_equal=bool(k < 0.2), nll=float(loss), original_nll=float(base))
        for k, loss, base in zip(kl, losses, original, strict=True)
    ]


def by_sums(positions: list[Divergence]) -> dict[str, tuple[float, float]]:
    """llama.cpp's way: sums over positions, variances from sums of squares, a covariance of both losses."""
    count = len(positions)

    def uncertain(values: list[float]) -> tuple[float, float]:
        first, second = sum(values) / count, sum(value * value for value in values) / count
        return first, math.sqrt((second - first * first) / (count - 1))

    losses, original = [p.nll for p in positions], [p.original_nll for p in positions]
    loss, base = uncertain(losses), uncertain(original)
    both = sum(a * b for a, b in zip(losses, original, strict=True)) / count
    covariance = (both - loss[0] * base[0]) / (count - 1)
    ratio = loss[0] - base[0], math.sqrt(loss[1] ** 2 + base[1] ** 2 - 2 * covariance)
    change = [math.exp(-a) - math.exp(-b) for a, b in zip(losses, original, strict=True)]
    squares = uncertain([value * value for value in change])
    same = sum(p.top1_equal for p in positions) / count
    return {
        "perplexity": (math.exp(loss[0]), math.exp(loss[0]) * loss[1]),
        "original_perplexity": (math.exp(base[0]), math.exp(base[0]) * base[1]),
        "log_ratio": ratio,
        "ratio": (math.exp(ratio[0]), math.exp(ratio[0]) * ratio[1]),
        "kl": uncertain([p.kl for p in positions]),
        "p_change": uncertain(change),
        "p_change_rms": (math.sqrt(squares[0]), 0.5 / math.sqrt(squares[0]) * squares[1]),
        "same_top": (same, math.sqrt(same * (1 - same) / (count - 1))),
        "correlation": (covariance / (loss[1] * base[1]), 0.0),
    }


@pytest.mark.parametrize("name", by_sums(drawn()))
def test_statistics_are_those_of_llama_cpp(name: str) -> None:
    found = getattr(summarize(drawn()), name)
    pair = (found.value, found.error) if isinstance(found, Estimate) else (found, 0.0)
    assert pair == pytest.approx(by_sums(drawn())[name], rel=1e-9)


def test_percentiles_lie_between_two_positions() -> None:
    """Of 0, 1, ..., 10 the 95th is 9.5, the 99.9th 9.99. Wilson of 11 in 11: from 11 / (11 + 1.96^2)."""
    found = summarize([Divergence(kl=k, top1_equal=True, nll=1, original_nll=1) for k in range(11)])
    expected = {99.9: 9.99, 99.0: 9.9, 95.0: 9.5, 90.0: 9.0, 50.0: 5.0}
    assert found.kl_percentiles == pytest.approx(expected)
    assert (found.kl_max, found.positions) == (10, 11)
    assert found.same_top_interval == pytest.approx((0.7412, 1.0), abs=5e-5)


def test_a_mean_and_its_error_by_hand() -> None:
    """1, 2, 3: variance 1, so 1 / sqrt(3)."""
    found = mean(np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert exponential(found).error == pytest.approx(math.exp(2) / math.sqrt(3))
    assert mean(np.array([4.0])) == Estimate(value=4.0, error=0.0)


def test_a_correlation_by_hand() -> None:
    """(1, 2, 3) and (1, 3, 2): covariance 1/3, variances 2/3."""
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx(0.5)
    assert correlation(np.array([2.0, 2.0]), np.array([2.0, 2.0])) == 1.0


@pytest.mark.parametrize(
    ("hits", "count", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_an_interval_of_wilson(hits: int, count: int, expected: tuple[float, float]) -> None:
    """The last is the example of Newcombe (1998), without continuity correction."""
    assert wilson(hits, count) == pytest.approx(expected, abs=5e-5)
    found = summarize([Divergence(kl=0, top1_equal=n < hits, nll=1, original_nll=1) for n in range(count)])
    assert found.same_top_interval == pytest.approx(expected, abs=5e-5)


def test_divergence_of_two_distributions() -> None:
    """By hand: p = (1/2, 1/2), q = (1/4, 3/4)."""
    found = diverge(np.log([0.5, 0.5]), np.log([0.25, 0.75]), token=1)
    assert found.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert found.nll == pytest.approx(-math.log(0.75))
    assert found.original_nll == pytest.approx(math.log(2))
    assert not found.top1_equal


def test_logits_that_are_no_numbers_are_not_a_divergence_of_0() -> None:
    found = diverge(np.array([0.0, 1.0]), np.array([0.0, np.nan]), token=0)
    assert math.isnan(found.kl)
    assert math.isnan(summarize([found, found]).kl.value)


def test_lines_have_the_names_of_llama_cpp_in_its_order() -> None:
    lines = dict(summarize(drawn()).lines())
    names = [
        "Mean PPL(Q)", "Mean PPL(base)", "Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean ln(PPL(Q)/PPL(base))",
        "Mean PPL(Q)/PPL(base)", "Mean KLD", "Maximum KLD", "99.9% KLD", "99.0% KLD", "95.0% KLD",
        "90.0% KLD", "Median KLD", "Mean \u0394p", "RMS \u0394p", "Same top p", "Same top p, 95 % of Wilson",
    ]  # fmt: skip
    assert list(lines) == names
    kl, ratio = (by_sums(drawn())[name] for name in ("kl", "ratio"))
    assert lines["Mean KLD"] == f"{kl[0]:.6f} \u00b1 {kl[1]:.6f}"
    assert lines["Mean PPL(Q)/PPL(base)"] == f"{ratio[0]:.6f} \u00b1 {ratio[1]:.6f}"


def test_statistics_survive_a_round_trip_through_json() -> None:
    found = summarize(drawn())
    assert Statistics.model_validate_json(found.model_dump_json()) == found
