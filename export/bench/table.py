"""A report as a table: what is measured, in which column, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stillgraph.exporter.bench.mermaid import charts
from stillgraph.exporter.bench.process import DISTURBED
from stillgraph.exporter.bench.report import Report, Result, Run, Setting, Spread, ratio, tpot_percentile
from stillgraph.exporter.validate.divergences import Statistics

NOTHING = "-"
BRIEF = (
    "contender",
    "TTFT ms",
    "vision ms",
    "TPOT ms",
    "load ms",
    "PSS MB",
    "MB a token",
    "TTFT ratio",
    "TPOT ratio",
    "KL nats",
    "same top",
    "same tokens",
    "note",
)


@dataclass(frozen=True)
class Column:
    heading: str
    cell: Callable[[Result, Report], str | None]


def columns(report: Report) -> list[str]:
    """The headings; the first is the contender, the last the note."""
    return [column.heading for column in _columns(report)]


def cells(result: Result, report: Report) -> list[str]:
    """A result's row, in the order of `columns`."""
    return [column.cell(result, report) or NOTHING for column in _columns(report)]


def brief(result: Result, report: Report) -> list[str]:
    """The cells of `BRIEF`, for a README and a terminal."""
    return [column.cell(result, report) or NOTHING for column in _columns(report) if column.heading in BRIEF]


def brief_columns(report: Report) -> list[str]:
    """The headings of `brief`."""
    return [heading for heading in columns(report) if heading in BRIEF]


def by_setting(report: Report) -> dict[Setting, list[Result]]:
    """The results at each point of a sweep, in order."""
    found: dict[Setting, list[Result]] = {}
    for result in report.results:
        found.setdefault(result.setting, []).append(result)
    return found


def markdown(report: Report) -> str:
    """The table for a README, its charts, and what it stands on; of a sweep one table a setting."""
    parts = []
    for setting, results in by_setting(report).items():
        rows = [brief(result, report) for result in results]
        head = brief_columns(report)
        lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
        lines.insert(1, "|---" * len(head) + "|")
        parts.append("\n".join([told(setting) + ":\n", *lines]))
    parts += [report.texts] if report.texts else []
    parts += charts(report)
    machine = report.machine
    parts.append(
        f"Median (least-most) of {report.turns} turns, ratios to {report.reference} within a turn."
        f" {machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB, {machine.bandwidth:.0f} GB/s;"
        f" {machine.system}; {report.date}."
    )
    return "\n\n".join([*parts, f"    {report.command}"]) + "\n"


def told(setting: Setting) -> str:
    return (
        f"prompt {setting.prompt_tokens}, {setting.new_tokens} new tokens, ctx {setting.ctx},"
        f" {setting.threads} threads" + (f", with {setting.image}" if setting.image else "")
    )


def against(result: Result, report: Report) -> Result | None:
    """What a result's ratios are over: the reference at the same setting."""
    found = (r for r in report.results if r.name == report.reference and r.setting == result.setting)
    return next((r for r in found if r.runs), None)


def equal_tokens(result: Result, report: Report) -> tuple[int, int] | None:
    """Leading tokens that equal those of the exact reference, and how many there are to compare."""
    exact = [r for r in report.results if r.exact and r.runs and r.setting == result.setting]
    exact.sort(key=lambda r: r.name != report.reference)
    if not exact or not result.runs:
        return None
    mine, theirs = result.runs[0].tokens, exact[0].runs[0].tokens
    same = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(mine), len(theirs)) if same is None else same), len(theirs)


def disagreements(report: Report) -> list[str]:
    """Names of contenders that compute exactly and whose tokens differ, or that differ from themselves."""
    names = []
    for result in report.results:
        found = equal_tokens(result, report)
        if (result.exact and found and found[0] < found[1]) or len({run.tokens for run in result.runs}) > 1:
            names.append(result.name)
    return names


def _columns(report: Report) -> list[Column]:
    saw = Column("vision ms", lambda r, _: _median(r, lambda run: run.vision_ms or None))
    time = [
        Column("TTFT ms", lambda r, _: _spread(r, lambda run: run.ttft_ms)),
        *([saw] if any(run.vision_ms for result in report.results for run in result.runs) else []),
        Column("TPOT ms", lambda r, _: _spread(r, _tpot)),
        Column("mean", lambda r, _: _mean(r, _tpot)),
        Column("p95", lambda r, _: _number(tpot_percentile(r, 0.95), 1)),
        Column("tokens/s", lambda r, _: _median(r, lambda run: run.tokens_per_second)),
        Column("load ms", lambda r, _: _median(r, lambda run: run.load_ms)),
        Column("first ms", lambda r, _: _median(r, lambda run: run.first_ttft_ms)),
        Column("swap ms", lambda r, _: _median(r, lambda run: run.swap_ms or None)),
    ]
    memory = [
        Column("PSS MB", lambda r, _: _median(r, lambda run: run.peak_pss_mb)),
        Column("RSS MB", lambda r, _: _median(r, lambda run: run.peak_rss_mb)),
        Column("weights MB", lambda r, _: _number(r.weights_mb, 0)),
        Column("cache MB", lambda r, _: _number(r.cache_mb, 0)),
        Column("MB a token", lambda r, _: _number(r.read_mb, 0)),
        Column("GB/s", _bandwidth),
    ]
    compared = [
        Column("TTFT ratio", lambda r, report: _ratio(r, report, lambda run: run.ttft_ms)),
        Column("TPOT ratio", lambda r, report: _ratio(r, report, _tpot)),
        Column("PSS ratio", lambda r, report: _ratio(r, report, lambda run: run.peak_pss_mb)),
        *(_quality() if any(result.quality for result in report.results) else []),
        Column("same tokens", _same),
    ]
    note = Column("note", lambda r, _: _note(r, report.turns))
    return [Column("contender", lambda r, _: r.label), *time, *memory, *compared, note]


def _quality() -> list[Column]:
    """Of the texts: see `Statistics`."""

    def column(heading: str, of: Callable[[Statistics], str]) -> Column:
        return Column(heading, lambda r, _: of(r.quality) if r.quality else None)

    return [
        column("KL nats", lambda q: f"{q.kl.value:.2g}"),
        column("KL 99 %", lambda q: f"{q.kl_percentiles[99.0]:.2g}"),
        column("same top", lambda q: f"{q.same_top.value:.1%}"),
        column("perplexity", lambda q: f"{q.perplexity.value:.2f} ({q.ratio.value:.3f})"),
    ]


def _tpot(run: Run) -> float | None:
    return run.tpot_ms if run.step_ms else None


def _number(value: float | None, decimals: int) -> str | None:
    return None if value is None else f"{value:.{decimals}f}"


def _decimals(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 1 else 2


def _shown(value: float) -> str:
    return f"{value:.{_decimals(value)}f}"


def _median(result: Result, measure: Callable[[Run], float | None]) -> str | None:
    spread = Spread.of(result.values(measure))
    return _shown(spread.median) if spread else None


def _mean(result: Result, measure: Callable[[Run], float | None]) -> str | None:
    spread = Spread.of(result.values(measure))
    return _shown(spread.mean) if spread else None


def _spread(result: Result, measure: Callable[[Run], float | None]) -> str | None:
    """Median and range."""
    spread = Spread.of(result.values(measure))
    if spread is None:
        return None
    decimals = _decimals(spread.median)
    median, least, most = (f"{v:.{decimals}f}" for v in (spread.median, spread.least, spread.most))
    return f"{median} ({least}-{most})"


def _bandwidth(result: Result, report: Report) -> str | None:
    found = result.bandwidth()
    return None if found is None else f"{found:.0f} ({found / report.machine.bandwidth:.0%})"


def _ratio(result: Result, report: Report, measure: Callable[[Run], float | None]) -> str | None:
    reference = against(result, report)
    return _number(ratio(result, reference, measure), 2) if reference else None


def _same(result: Result, report: Report) -> str | None:
    found = equal_tokens(result, report)
    return None if found is None else f"{found[0]} of {found[1]}"


def _note(result: Result, turns: int) -> str | None:
    if result.note:
        return result.note
    noisy = sum(run.other_cores >= DISTURBED for run in result.runs)
    return f"{noisy} of {turns} turns disturbed by other programs" if noisy else None
