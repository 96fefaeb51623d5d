"""What a contender does over time: ms a token over position, memory through load, prefill and decode."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import TYPE_CHECKING

from stillgraph.exporter.bench.measures import at_first_setting
from stillgraph.exporter.bench.report import MemoryTrace, Report
from stillgraph.exporter.bench.style import INK, Drawn, colors, grid, legend, line, new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PHASES = {
    "load": "#8b93a1",
    "first request": "#e0912f",
    "request": "#36a3c9",
    "prefill": "#14a38b",
    "swap": "#df5f8d",
    "decode": "#3b82f6",
}


MANY = 4  # contenders from which on a plot is as wide as the page
FAR = 6.0  # slowest over fastest, from which on a linear axis shows the fast ones as one line


def positions(report: Report) -> Drawn:
    """Time per token over position, a line a contender."""
    results = [result for result in at_first_setting(report) if any(run.step_ms for run in result.runs)]
    if not results:
        return
    many = len(results) > MANY
    figure, (axes,) = new(max(3.6, 0.27 * len(results)) if many else 3.3 + 0.1 * len(results), wide=many)
    shown = []
    for result in results:
        steps = [run.step_ms for run in result.runs if run.step_ms]
        median = [statistics.median(column) for column in zip(*steps, strict=False)]
        shown.append(statistics.median(median))
        first = result.setting.prompt_tokens + 1
        marker = "o" if len(median) == 1 else None
        line(axes, report, result, range(first, first + len(median)), median, marker=marker)
    if max(shown) > FAR * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("position of the token")
    axes.set_ylabel("ms")
    grid(axes, "y")
    legend(figure, axes)
    yield "Time per token over position", "Each later token of the request: median over the runs.", figure


def memory_over_time(report: Report) -> Drawn:
    """Memory of one run, a panel a contender."""
    found = [(result, result.memory) for result in at_first_setting(report)
             if result.memory and result.memory.samples]  # fmt: skip
    if not found:
        return
    columns = 3 if len(found) > MANY else 1
    rows = -(-len(found) // columns)
    figure, panels = new(0.9 + 1.05 * rows, rows, columns, columns > 1, sharex=True, sharey=True)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes in panels[len(found) - columns : len(found)]:  # the lowest of each column
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel("seconds since the process began")
    for axes, (result, memory) in zip(panels, found, strict=False):
        _memory_panel(axes, memory, colors(report)[result.name])
        axes.set_title(result.label, loc="left", fontsize=9, pad=3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_xlim(left=0)
    figure.supylabel("PSS, MB", fontsize=10)
    named = {str(handle.get_label()): handle for axes in panels for handle in axes.patches}
    order = [name for name in PHASES if name in named] + [name for name in named if name not in PHASES]
    figure.legend(
        [named[name] for name in order], order, loc="outside upper left", ncols=5, frameon=False, fontsize=9,
        handlelength=1, columnspacing=1.2,
    )  # fmt: skip
    yield (
        "Memory over time",
        "PSS of one uncounted run, sampled from outside; the shades are its phases.",
        figure,
    )


def _memory_panel(axes: Axes, memory: MemoryTrace, color: str) -> None:
    end = memory.samples[-1][0]
    marks = [*memory.marks, (end, "")]
    for (start, name), (stop, _) in pairwise(marks):
        if stop > start:
            shade = PHASES.get(name, INK)
            axes.axvspan(start / 1e3, stop / 1e3, color=shade, alpha=0.24, linewidth=0, label=name)
    axes.plot([ms / 1e3 for ms, _ in memory.samples], [mb for _, mb in memory.samples], color=color,
              linewidth=1.8, marker="o" if len(memory.samples) == 1 else None)  # fmt: skip
    axes.locator_params(axis="y", nbins=4)
    grid(axes, "y")
