"""A benchmark's report as one self-contained HTML page, readable in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jinja2
from markupsafe import Markup

from runtime.bench.report import Report, Result, Run, ratio
from runtime.bench.table import against, by_setting, told
from runtime.errors import StillgraphError

TERMS = {
    "TTFT": "time to first token: from the request to its first token, the prompt computed whole",
    "TPOT": "time per output token: mean of the steps after the first token; p95 over all steps of all runs",
    "load": "from the start of loading to ready; first: TTFT of the first request after it",
    "swap": "time of a request that loads graphs, with --unload-prefill; in neither of the former",
    "PSS": "proportional set size, pages that are mapped twice counted once; RSS counts them twice",
    "GB/s": "bytes of weights that a step reads over TPOT, and that as a share of what a probe reads",
    "same tokens": "leading tokens that equal those of PyTorch in fp32; few bits make other tokens in time",
    "ratio": "this contender over the reference within one turn, median over turns",
}

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Benchmark of {{ report.model }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
.lead { font-size: 1.1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .78rem; }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; min-width: 12rem; color: #b45309; }
tr.subject td:first-child { font-weight: 600; color: #3b82f6; }
svg { width: 100%; height: auto; } .scroll { overflow-x: auto; } .plot { min-width: 40rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dd { margin: 0; } code { font-size: .85em; overflow-wrap: anywhere; }
</style></head><body>
<h1>{{ report.model }}</h1>
<p class="lead">{{ headline }}</p>
<dl>{% for term, value in facts %}<dt>{{ term }}</dt><dd>{{ value }}</dd>{% endfor %}
<dt>command</dt><dd><code>{{ report.command }}</code></dd></dl>
{% for title, rows in tables %}<h2>{{ title }}</h2>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr{% if loop.first %} class="subject"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
{% for title, plot in plots %}<h2>{{ title }}</h2><div class="scroll"><div class="plot">{{ plot }}</div></div>
{% endfor %}
<h2>Terms</h2><dl>{% for term, meaning in terms %}<dt>{{ term }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
<h2>Versions</h2><dl>{% for term, value in versions %}<dt>{{ term }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body></html>
""",
    autoescape=True,
)


def page(report: Report, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The page's HTML; rows are the cells of `report.results`, in order.

    Raises StillgraphError where matplotlib is not installed.
    """
    of_result = dict(zip(map(id, report.results), rows, strict=True))
    machine = report.machine
    facts = [
        ("machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB of memory"),
        ("memory", f"{machine.bandwidth:.0f} GB/s, by a probe of a second"),
        ("system", machine.system),
        ("date", report.date),
        (
            "runs",
            f"{report.turns} of each, in turns, after one that is not counted; ratios to {report.reference}",
        ),
    ]
    html: str = PAGE.render(
        report=report,
        headline=headline(report),
        facts=facts,
        columns=columns,
        tables=[
            (told(setting), [of_result[id(result)] for result in results])
            for setting, results in by_setting(report).items()
        ],
        plots=[(title, Markup(plot)) for title, plot in _plots(report)],
        terms=TERMS.items(),
        versions=[
            (result.label, ", ".join(f"{name} {version}" for name, version in result.versions.items()))
            for result in next(iter(by_setting(report).values()))
            if result.versions
        ],
    )
    return html


def headline(report: Report) -> str:
    """What the bundle gains over the reference, in a sentence."""
    subject = report.results[0]
    reference = against(subject, report)
    if reference is None or reference is subject or not subject.runs:
        return subject.note or f"{subject.label}: {len(subject.runs)} runs, and none to compare with."
    measures: dict[str, Callable[[Run], float | None]] = {
        "TTFT": lambda run: run.ttft_ms,
        "TPOT": lambda run: run.tpot_ms if run.step_ms else None,
        "peak PSS": lambda run: run.peak_pss_mb,
    }
    found = {name: ratio(subject, reference, measure) for name, measure in measures.items()}
    parts = [f"{value:.2f} of the {name}" for name, value in found.items() if value is not None]
    return f"{subject.label} takes {', '.join(parts)} of {reference.label}."


def _plots(report: Report) -> list[tuple[str, str]]:
    try:
        from runtime.bench import plots
    except ModuleNotFoundError as error:
        problem = f"{error.name} is not installed, so that bench.html is not written"
        raise StillgraphError("bench", problem, "pip install 'stillgraph[bench]'") from error
    first: list[Result] = next(iter(by_setting(report).values()))
    found: list[tuple[str, str]] = []
    if any(result.runs for result in first):
        found += [
            ("Time to first token", plots.bars(first, lambda run: run.ttft_ms, "ms")),
            (
                "Time per output token",
                plots.bars(first, lambda run: run.tpot_ms if run.step_ms else None, "ms"),
            ),
            ("Peak memory", plots.bars(first, lambda run: run.peak_pss_mb, "PSS, MB")),
            ("Time per token over position", plots.steps(first)),
        ]
    if any(result.memory for result in first):
        found.append(("Memory over time", plots.memory(first)))
    for name in plots.varied(report):
        over = name.replace("_", " ")
        found += [
            (f"TTFT over {over}", plots.sweeps(report, name, lambda run: run.ttft_ms, "TTFT, ms")),
            (f"TPOT over {over}", plots.sweeps(report, name, lambda run: run.tpot_ms, "TPOT, ms")),
        ]
    for profile in report.profiles:
        title = f"Where {profile.graph} spends its time: {profile.total_ms:.1f} ms a run"
        found.append((title, plots.profile(profile)))
    return found
