"""The plots of a benchmark as inline SVG, with text as text, in colors that read on white and on black.

matplotlib comes with the extra `bench`; `figures` is the only place that imports it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bench.frontier import quality_over_speed
from stillgraph.exporter.bench.measures import (
    SWEPT,
    Measure,
    at_first_setting,
    memory_measure,
    swept,
    tpot,
    ttft,
)
from stillgraph.exporter.bench.report import Hotspot, Report, Result, Setting, Spread
from stillgraph.exporter.bench.style import COLORS, INK, WIDTH, Drawn, grid, legend, line, new, style, svg
from stillgraph.exporter.bench.timeline import memory_over_time, positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 12


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its heading, what it shows in a sentence, and its SVG."""

    title: str
    text: str
    svg: str
    group: str
    wide: bool


def figures(report: Report) -> list[Plot]:
    """Every plot that the report has data for. StillgraphError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise StillgraphError(
            "draw the benchmark page", "matplotlib is not installed", "pip install 'stillgraph[bench]'"
        ) from error
    with mpl.rc_context(style()):
        groups = {
            "At one setting": [
                *_bars(report),
                *quality_over_speed(report),
                *positions(report),
                *memory_over_time(report),
            ],
            "Over settings": list(_sweeps(report)),
            "Where the time goes": list(_profiles(report)),
        }
        drawn = [(group, *one) for group, found in groups.items() for one in found]
        return [
            Plot(title, text, svg(figure, f"f{n}"), group, figure.get_figwidth() > WIDTH)
            for n, (group, title, text, figure) in enumerate(drawn)
        ]


def _bars(report: Report) -> Drawn:
    results = at_first_setting(report)
    memory, of_memory = memory_measure(results)
    yield from _bar(results, "Time to first token", "TTFT, ms", ttft)
    yield from _bar(results, "Time per output token", "TPOT, ms", tpot)
    yield from _bar(results, "Peak memory", f"{memory}, MB", of_memory)


def _bar(results: Sequence[Result], title: str, label: str, measure: Measure) -> Drawn:
    known = [(result, result.values(measure)) for result in results if result.values(measure)]
    if not known:
        return
    figure, (axes,) = new(0.75 + 0.42 * len(known))
    for place, (result, values) in enumerate(known):
        spread = Spread.of(values)
        assert spread is not None
        own = result.name == results[0].name
        color = COLORS[0] if own else INK
        axes.barh(place, spread.median, height=0.62, color=color, alpha=0.9 if own else 0.45, linewidth=0)
        axes.plot([spread.least, spread.most], [place, place], color=INK, linewidth=1.2)
        axes.plot(values, [place] * len(values), "o", markersize=3.2, color=INK, markeredgewidth=0)
        axes.annotate(
            f"{spread.median:,.3g}" if spread.median < 100 else f"{spread.median:,.0f}",
            (spread.most, place), xytext=(7, 0), textcoords="offset points", va="center",
            fontweight="bold" if own else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(known)), [result.label for result, _ in known])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlim(0, 1.16 * max(max(values) for _, values in known) or 1)
    axes.spines["left"].set_visible(False)
    grid(axes, "x")
    axes.set_xlabel(label)
    yield title, "Median; the line spans least to most, a dot is a run. Shorter is better.", figure


def _sweeps(report: Report) -> Drawn:
    base = report.results[0].setting if report.results else Setting()
    for name in swept(report):
        fixed = base.model_dump(exclude={name})
        results = [result for result in report.results if result.setting.model_dump(exclude={name}) == fixed]
        for label, measure in (("TTFT", ttft), ("TPOT", tpot)):
            known = [result for result in results if result.values(measure)]
            often = Counter(result.name for result in known)
            known = [result for result in known if often[result.name] > 1]
            if known:
                text = "Median over the runs of each setting."
                yield f"{label} over {SWEPT[name]}", text, _sweep(report, known, name, label, measure)


def _sweep(report: Report, results: Sequence[Result], name: str, label: str, measure: Measure) -> Figure:
    figure, (axes,) = new(3.2)
    for contender in dict.fromkeys(result.name for result in results):
        own = sorted((r for r in results if r.name == contender), key=lambda r: int(getattr(r.setting, name)))
        x = [getattr(result.setting, name) for result in own]
        y = [statistics.median(result.values(measure)) for result in own]
        line(axes, report, own[0], x, y, marker="o", markersize=4)
    ticks = sorted({getattr(result.setting, name) for result in results})
    if ticks[-1] >= 8 * ticks[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(SWEPT[name])
    axes.set_ylabel(f"{label}, ms")
    grid(axes, "y")
    legend(figure, axes)
    return figure


def _profiles(report: Report) -> Drawn:
    for profile in report.profiles:
        for title, spots in (("by op type", profile.by_op), ("by layer", profile.by_layer)):
            if spots:
                text = f"Mean of {profile.runs} runs of the graph, {profile.total_ms:.1f} ms each."
                draw = _by_op if title == "by op type" else _by_layer
                yield f"{profile.graph}: time {title}", text, draw(spots)


def _by_op(spots: Sequence[Hotspot]) -> Figure:
    ordered = sorted(spots, key=lambda spot: -spot.ms)
    shown = [(spot.name, spot.ms) for spot in ordered[:MOST_BARS]]
    if ordered[MOST_BARS:]:
        shown.append(("others", sum(spot.ms for spot in ordered[MOST_BARS:])))
    figure, (axes,) = new(0.7 + 0.25 * len(shown))
    bars = axes.barh([name for name, _ in shown], [ms for _, ms in shown], color=COLORS[0], height=0.66)
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
    grid(axes, "x")
    return figure


def _by_layer(spots: Sequence[Hotspot]) -> Figure:
    figure, (axes,) = new(3.0)
    axes.bar(range(len(spots)), [spot.ms for spot in spots], color=COLORS[0], width=0.72)
    axes.set_xticks(
        range(len(spots)), [spot.name.removeprefix("layer ") for spot in spots], rotation=90, fontsize=8
    )
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.01)
    axes.set_ylabel("ms")
    grid(axes, "y")
    return figure
