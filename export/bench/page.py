"""The benchmark as one self-contained HTML page: no script, no outside resource, for light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import jinja2
from markupsafe import Markup

from stillgraph.exporter.bench.measures import Measure, at_first_setting, memory_measure, swept, tpot, ttft
from stillgraph.exporter.bench.plots import figures
from stillgraph.exporter.bench.report import Report, Result, ratio
from stillgraph.exporter.validate.divergences import Statistics

GLOSSARY = (
    ("TTFT", "time to first token: from the request to its first token, in ms; of a run, of three requests"),
    ("TPOT", "time per output token: mean time of the tokens after the first, in ms"),
    ("p95", "what 95 % of all steps of all runs stay within"),
    ("tokens/s", "new tokens of the whole request, its prompt included, over its time"),
    ("first request", "TTFT of the request that warms up; it is not counted elsewhere"),
    ("PSS", "proportional set size: memory of the process, a page that n processes share counting 1/n"),
    ("RSS", "resident set size: memory of the process, shared pages counting whole"),
    ("MB, GB/s", "10^6 bytes; 10^9 bytes a second"),
    (
        "GB/s",
        "weights that a step reads over the median TPOT; its share is of what a probe of this machine reads",
    ),
    ("weights, cache", "bytes of the weights on disk; of keys and values at ctx"),
    (
        "KL",
        "mean KL divergence of the next token's distribution from PyTorch fp32, in nats; 99 %: percentile",
    ),
    ("same top", "share of tokens whose most probable next one is PyTorch's"),
    ("perplexity", "of the text; in brackets over that of PyTorch fp32"),
    (
        "ratio",
        "median over turns of this contender's figure over the reference's: below 1 is less time or memory",
    ),
    ("turn", "every contender runs once, in a new process, before any runs again"),
    ("ctx", "slots of the cache: tokens that prompt and answer may have together"),
    ("swap", "time in which a graph is loaded within a request; neither TTFT nor TPOT has it"),
)


def page(report: Report, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The HTML of bench.html.

    columns, rows: the table as plain text, a row a result in the report's order; the first column is the
    label, the last the note. StillgraphError where matplotlib is not installed.
    """
    plots = [(plot, Markup(plot.svg)) for plot in figures(report)]
    source = resources.files("stillgraph.exporter.bench").joinpath("page.html.j2").read_text(encoding="utf-8")
    html: str = jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True).render(
        report=report,
        headline=headline(report),
        setting=report.results[0].setting if report.results else None,
        swept=swept(report),
        columns=columns,
        rows=list(zip(report.results, rows, strict=True)),
        plots=plots,
        groups=list(dict.fromkeys(plot.group for plot, _ in plots)),
        glossary=GLOSSARY,
    )
    return html


def headline(report: Report) -> str:
    """One sentence: how much faster and smaller the bundle is than the reference, at the first setting."""
    results = at_first_setting(report) if report.results else []
    if not results or not results[0].runs:
        note = results[0].note if results else None
        return "The bundle has no counted run" + (f": {note}." if note else ".")
    own = results[0]
    reference = next((result for result in results if result.name == report.reference), None)
    if reference is None or reference is own or not reference.runs:
        return f"{own.label} is measured without a reference to compare it with."
    times = [(ttft, "to the first token"), (tpot, "per later token")]
    said = [text for measure, what in times if (text := _times(own, reference, measure, what))]
    if not said:
        return f"{own.label} and {reference.label} share no turn to compare."
    name, measure = memory_measure([own, reference])
    faster = (
        f"{own.label} is {' and '.join(said)} as {reference.label}{_memory(own, reference, name, measure)}"
    )
    return f"{faster}; {_nearness(own.quality)}." if own.quality else f"{faster}."


def _times(own: Result, reference: Result, measure: Measure, what: str) -> str | None:
    share = ratio(own, reference, measure)
    if not share:
        return None
    return f"{1 / share:.2f} times as fast {what}"


def _nearness(quality: Statistics) -> str:
    same, kl = quality.same_top.value, quality.kl.value
    return f"{same:.0%} of its best tokens are those of PyTorch fp32, and the KL divergence is {kl:.2g} nats"


def _memory(own: Result, reference: Result, name: str, measure: Measure) -> str:
    share = ratio(own, reference, measure)
    if share is None:
        return ""
    percent = round(100 * abs(share - 1))
    amount = f"{percent} % {'less' if share < 1 else 'more'}" if percent else "as much"
    return f", with {amount} memory ({name})"
