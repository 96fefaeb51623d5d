"""The plots of a benchmark as inline SVG, with text as text, in colours that read on white and on black.

matplotlib comes with the extra `bench`; `figures` is the only place that imports it.
"""

from __future__ import annotations

import io
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from runtime.bench.measures import SWEPT, Measure, at_first_setting, memory_measure, swept, tpot, ttft
from runtime.bench.report import Hotspot, Memory, Report, Result, Setting, Spread
from runtime.errors import StillgraphError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7b818c"  # becomes the page's own ink, see `_svg`
COLOURS = ("#3b82f6", "#e0912f", "#14a38b", "#a26be0", "#df5f8d", "#8c9a35", "#36a3c9", "#b8785a")
PHASES = {
    "load": "#8b93a1",
    "first request": "#e0912f",
    "request": "#36a3c9",
    "prefill": "#14a38b",
    "swap": "#df5f8d",
    "decode": "#3b82f6",
}
WIDTH = 5.4  # inches: two beside each other on a desk, one on a phone, both with readable text
MOST_BARS = 12


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its heading, what it shows in a sentence, and its SVG."""

    title: str
    text: str
    svg: str
    group: str


def figures(report: Report) -> list[Plot]:
    """Every plot that the report has data for. StillgraphError where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise StillgraphError(
            "draw the benchmark page", "matplotlib is not installed", "pip install 'stillgraph[bench]'"
        ) from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, INK)
    style |= {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "bench",
        "font.size": 10,
        "axes.linewidth": 0.8,
    }
    style |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    with mpl.rc_context(style):
        groups = {
            "At one setting": [*_bars(report), *_positions(report), *_memory(report)],
            "Over settings": list(_sweeps(report)),
            "Where the time goes": list(_profiles(report)),
        }
        drawn = [(group, *one) for group, found in groups.items() for one in found]
        return [
            Plot(title, text, _svg(figure, f"f{n}"), group)
            for n, (group, title, text, figure) in enumerate(drawn)
        ]


Drawn = Iterator[tuple[str, str, "Figure"]]


def _new(height: float, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(rows, 1, squeeze=False, **options)[:, 0])


def _svg(figure: Figure, prefix: str) -> str:
    """The SVG without prolog; its ids are unique in the page, and its ink follows the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
    return text.replace(INK, "var(--ink, #7b818c)")


def _colours(report: Report) -> dict[str, str]:
    """A colour a contender, the same in every plot; the bundle's own is the first."""
    names = list(dict.fromkeys(result.name for result in report.results))
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


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
    figure, (axes,) = _new(0.75 + 0.42 * len(known))
    for place, (result, values) in enumerate(known):
        spread = Spread.of(values)
        assert spread is not None
        own = result.name == results[0].name
        colour = COLOURS[0] if own else INK
        axes.barh(place, spread.median, height=0.62, color=colour, alpha=0.9 if own else 0.45, linewidth=0)
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
    _grid(axes, "x")
    axes.set_xlabel(label)
    yield title, "Median; the line spans least to most, a dot is a run. Shorter is better.", figure


def _grid(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=INK, alpha=0.22, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _line(
    axes: Axes, report: Report, result: Result, x: Sequence[float], y: Sequence[float], **more: Any
) -> None:
    own = result.name == report.results[0].name
    axes.plot(
        x, y, color=_colours(report)[result.name], label=result.label, linewidth=2.2 if own else 1.3,
        zorder=3 if own else 2, **more,
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    wide = max(map(len, unique), default=0) > 22
    figure.legend(
        list(unique.values()), [str(name) for name in unique], loc="outside upper left",
        ncols=2 if wide else 3, frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip


def _positions(report: Report) -> Drawn:
    results = [result for result in at_first_setting(report) if any(run.step_ms for run in result.runs)]
    if not results:
        return
    figure, (axes,) = _new(3.3 + 0.1 * len(results))
    for result in results:
        steps = [run.step_ms for run in result.runs if run.step_ms]
        median = [statistics.median(column) for column in zip(*steps, strict=False)]
        first = result.setting.prompt_tokens + 1
        marker = "o" if len(median) == 1 else None
        _line(axes, report, result, range(first, first + len(median)), median, marker=marker)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position of the token")
    axes.set_ylabel("ms")
    _grid(axes, "y")
    _legend(figure, axes)
    yield "Time per token over position", "Each later token of the request: median over the runs.", figure


def _memory(report: Report) -> Drawn:
    found = [(result, result.memory) for result in at_first_setting(report)
             if result.memory and result.memory.samples]  # fmt: skip
    if not found:
        return
    figure, panels = _new(0.9 + 1.05 * len(found), len(found), sharex=True, sharey=True)
    for axes, (result, memory) in zip(panels, found, strict=True):
        _memory_panel(axes, memory, _colours(report)[result.name])
        axes.set_title(result.label, loc="left", fontsize=9, pad=3)
    panels[0].set_ylim(bottom=0)
    panels[0].set_xlim(left=0)
    panels[-1].set_xlabel("seconds since the process began")
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


def _memory_panel(axes: Axes, memory: Memory, colour: str) -> None:
    end = memory.samples[-1][0]
    marks = [*memory.marks, (end, "")]
    for (start, name), (stop, _) in pairwise(marks):
        if stop > start:
            shade = PHASES.get(name, INK)
            axes.axvspan(start / 1e3, stop / 1e3, color=shade, alpha=0.24, linewidth=0, label=name)
    axes.plot([ms / 1e3 for ms, _ in memory.samples], [mb for _, mb in memory.samples], color=colour,
              linewidth=1.8, marker="o" if len(memory.samples) == 1 else None)  # fmt: skip
    axes.locator_params(axis="y", nbins=4)
    _grid(axes, "y")


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
    figure, (axes,) = _new(3.2)
    for contender in dict.fromkeys(result.name for result in results):
        own = sorted((r for r in results if r.name == contender), key=lambda r: int(getattr(r.setting, name)))
        x = [getattr(result.setting, name) for result in own]
        y = [statistics.median(result.values(measure)) for result in own]
        _line(axes, report, own[0], x, y, marker="o", markersize=4)
    ticks = sorted({getattr(result.setting, name) for result in results})
    if ticks[-1] >= 8 * ticks[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(SWEPT[name])
    axes.set_ylabel(f"{label}, ms")
    _grid(axes, "y")
    _legend(figure, axes)
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
    figure, (axes,) = _new(0.7 + 0.25 * len(shown))
    bars = axes.barh([name for name, _ in shown], [ms for _, ms in shown], color=COLOURS[0], height=0.66)
    axes.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms")
    _grid(axes, "x")
    return figure


def _by_layer(spots: Sequence[Hotspot]) -> Figure:
    figure, (axes,) = _new(3.0)
    axes.bar(range(len(spots)), [spot.ms for spot in spots], color=COLOURS[0], width=0.72)
    axes.set_xticks(
        range(len(spots)), [spot.name.removeprefix("layer ") for spot in spots], rotation=90, fontsize=8
    )
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.01)
    axes.set_ylabel("ms")
    _grid(axes, "y")
    return figure
