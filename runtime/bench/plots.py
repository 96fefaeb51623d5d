"""The plots of a benchmark, as inline SVG that reads on white and on black."""

from __future__ import annotations

import io
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.bench.report import Hotspot, Profile, Report, Result, Run, Setting

INK = "#808691"  # reads on white and on black
OURS, OTHERS = "#3b82f6", "#94a3b8"
LINES = "#3b82f6 #f59e0b #10b981 #ef4444 #a855f7 #06b6d4 #ec4899 #84cc16 #f97316 #6366f1".split()
PHASES = {"prefill": "#3b82f6", "decode": "#10b981"}
STYLE: dict[Any, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
WIDTH = 9  # inches
MARKERS = "osD^v"
_number = itertools.count()


def svg(draw: Callable[[], Figure]) -> str:
    """A figure as an `<svg>` element; ids differ between the figures of a page."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": f"bench{next(_number)}"}):
        figure = draw()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bars(results: Sequence[Result], measure: Callable[[Run], float | None], unit: str) -> str:
    """One bar a contender, the median, with the range as a whisker and a dot for each run."""

    def draw() -> Figure:
        shown = [result for result in results if result.values(measure)]
        figure, axes = plt.subplots(figsize=(WIDTH, 0.7 + 0.34 * len(shown)), layout="constrained")
        for place, result in enumerate(shown):
            values = result.values(measure)
            middle = statistics.median(values)
            axes.barh(place, middle, color=_colour(result), height=0.62)
            axes.plot([min(values), max(values)], [place, place], color=INK, linewidth=1.2)
            axes.plot(values, [place] * len(values), ".", color=INK, markersize=4, alpha=0.7)
            text = f"{middle:.0f}" if middle >= 100 else f"{middle:.1f}" if middle >= 1 else f"{middle:.2f}"
            axes.annotate(
                f" {text}", (max(values), place), va="center", xytext=(3, 0), textcoords="offset points"
            )
        axes.set_yticks(range(len(shown)), [result.label for result in shown])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.margins(x=0.1)
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.2)
        axes.tick_params(axis="y", length=0)
        return figure

    return svg(draw)


def steps(results: Sequence[Result]) -> str:
    """Time of each step over its position: the median over runs."""

    def draw() -> Figure:
        figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
        for index, result in enumerate(result for result in results if result.runs):
            rows = zip(*(run.step_ms for run in result.runs), strict=False)
            times = [statistics.median(row) for row in rows]
            first = result.setting.prompt_tokens + 1
            axes.plot(range(first, first + len(times)), times, label=result.label, **_line(index))
        axes.set_yscale("log")
        axes.set_xlabel("position")
        axes.set_ylabel("ms a token")
        _finish(axes)
        return figure

    return svg(draw)


def memory(results: Sequence[Result]) -> str:
    """PSS over time, a panel a contender, phases shaded."""

    def draw() -> Figure:
        shown = [result for result in results if result.memory]
        rows = -(-len(shown) // 3)
        size = (WIDTH, 0.6 + 1.5 * rows)
        figure, grid = plt.subplots(rows, 3, figsize=size, layout="constrained", sharey=True, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, result in zip(grid.flat, shown, strict=False):
            _memory(axes, result)
        figure.supylabel("PSS, GB", fontsize=9)
        figure.supxlabel(
            "seconds; blue: prefill, green: decode, of the first request and of the second", fontsize=9
        )
        return figure

    return svg(draw)


def _memory(axes: Axes, result: Result) -> None:
    assert result.memory is not None
    times, values = zip(*result.memory.samples, strict=True)
    axes.fill_between([t / 1e3 for t in times], [v / 1e3 for v in values], color=_colour(result), alpha=0.35)
    axes.plot([t / 1e3 for t in times], [v / 1e3 for v in values], color=_colour(result), linewidth=1)
    marks = [*result.memory.marks, (times[-1], "end")]
    for (begin, what), (end, _) in itertools.pairwise(marks):
        if what in PHASES:
            axes.axvspan(begin / 1e3, end / 1e3, color=PHASES[what], alpha=0.12, linewidth=0)
    axes.set_title(result.label, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)


def sweeps(report: Report, varied: str, measure: Callable[[Run], float | None], what: str) -> str:
    """A measure over what the sweep varies: one line a contender."""

    def draw() -> Figure:
        figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
        for index, name in enumerate(dict.fromkeys(result.name for result in report.results)):
            same = [result for result in report.results if result.name == name and result.values(measure)]
            points = [
                (getattr(result.setting, varied), statistics.median(result.values(measure)))
                for result in same
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=same[0].label, **_line(index))
        axes.set_xlabel(varied.replace("_", " "))
        axes.set_ylabel(what)
        axes.set_yscale("log")
        _finish(axes)
        return figure

    return svg(draw)


def varied(report: Report) -> list[str]:
    """The names in a setting that a sweep varies."""
    names = list(Setting.model_fields)
    return [name for name in names if len({getattr(r.setting, name) for r in report.results}) > 1]


def profile(found: Profile) -> str:
    """Time by op type and by part of the model, side by side."""

    def draw() -> Figure:
        by_op = [spot for spot in found.by_op if spot.ms > 0.002 * found.total_ms][:14]
        height = 0.8 + 0.19 * max(len(by_op), len(found.by_layer))
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained")
        _spots(left, by_op)
        _spots(right, found.by_layer)
        return figure

    return svg(draw)


def _spots(axes: Axes, spots: Sequence[Hotspot]) -> None:
    axes.barh(range(len(spots)), [spot.ms for spot in spots], color=OURS, height=0.65)
    axes.set_yticks(range(len(spots)), [spot.name for spot in spots], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms a run")
    axes.grid(axis="x", alpha=0.2)
    axes.tick_params(axis="y", length=0)


def _colour(result: Result) -> str:
    return OURS if result.label.startswith("Stillgraph") else OTHERS


def _line(index: int) -> dict[str, Any]:
    return {
        "color": LINES[index % len(LINES)],
        "linestyle": ("-", "--", ":")[index // len(LINES) % 3],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3,
        "linewidth": 1.2,
    }


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
