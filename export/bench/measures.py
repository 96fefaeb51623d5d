"""What the page compares: measures of a run, and the results they are compared over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillgraph.exporter.bench.report import Report, Result, Run

SWEPT = {
    "prompt_tokens": "tokens of the prompt",
    "new_tokens": "new tokens",
    "ctx": "cache slots (ctx)",
    "threads": "threads",
}
Measure = Callable[[Run], float | None]


def tpot(run: Run) -> float | None:
    """TPOT in ms; None for a request of one token."""
    return run.tpot_ms if run.step_ms else None


def ttft(run: Run) -> float:
    """TTFT in ms."""
    return run.ttft_ms


def pss(run: Run) -> float | None:
    """Peak PSS in MB, where the system tells it."""
    return run.peak_pss_mb


def rss(run: Run) -> float:
    """Peak RSS in MB."""
    return run.peak_rss_mb


def at_first_setting(report: Report) -> list[Result]:
    """The results at the setting of the first one, which the headline and the bars are about."""
    return [result for result in report.results if result.setting == report.results[0].setting]


def memory_measure(results: Sequence[Result]) -> tuple[str, Measure]:
    """Peak PSS where every contender that ran has it, else peak RSS: bars compare like with like."""
    lacking = any(pss(run) is None for result in results for run in result.runs)
    return ("peak RSS", rss) if lacking else ("peak PSS", pss)


def swept(report: Report) -> list[str]:
    """The fields of the setting that vary over the results."""
    return [name for name in SWEPT if len({getattr(result.setting, name) for result in report.results}) > 1]
