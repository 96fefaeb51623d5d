"""A benchmark's bars as Mermaid charts, as code hosts show them in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from stillgraph.exporter.bench.measures import Measure, at_first_setting, memory_measure, tpot, ttft
from stillgraph.exporter.bench.report import Report, Result

ROW = 26  # pixels of height for a bar and its gap
CHART = """```mermaid
---
config:
    xyChart:
        width: 900
        height: {height}
        showDataLabel: true
        xAxis:
            labelFontSize: 13
    themeVariables:
        xyChart:
            plotColorPalette: "#7aa7f5"
---
xychart-beta horizontal
    title "{title}"
    x-axis [{labels}]
    y-axis 0 --> {end}
    bar [{values}]
```"""


def charts(report: Report) -> Iterator[str]:
    """One for TTFT, TPOT and memory, of the medians of all that ran at the first setting."""
    results = [result for result in at_first_setting(report) if result.runs]
    memory, of_memory = memory_measure(results)
    for title, measure in (("TTFT, ms", ttft), ("TPOT, ms", tpot), (f"{memory}, MB", of_memory)):
        known = [result for result in results if result.values(measure)]
        if len(known) > 1:
            yield _chart(f"{title}: median of {report.turns} turns, less is better", known, measure)


def _chart(title: str, results: Sequence[Result], measure: Measure) -> str:
    values = [statistics.median(result.values(measure)) for result in results]
    return CHART.format(
        title=title,
        height=90 + ROW * len(results),
        labels=", ".join(f'"{result.label}"' for result in results),
        end=f"{1.05 * max(values):.0f}",
        values=", ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values),
    )
