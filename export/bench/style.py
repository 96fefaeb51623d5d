"""How plots of a benchmark look: size, ink, colors, lines and legends, and a figure as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stillgraph.exporter.bench.report import Report, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7b818c"  # becomes the page's own ink, see `svg`
COLORS = ("#3b82f6", "#e0912f", "#14a38b", "#a26be0", "#df5f8d", "#8c9a35", "#36a3c9", "#b8785a")
DASHES = ("-", "--", ":")  # of the first contenders, which have a color each, and of those after them
WIDTH = 5.4  # inches: two beside each other on a desk, one on a phone, both with readable text
WIDE = 11.4  # inches: as wide as the page

Drawn = Iterator[tuple[str, str, "Figure"]]


def style() -> dict[Any, Any]:
    """What matplotlib is told of all figures."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    values: dict[Any, Any] = dict.fromkeys(inked, INK)
    values |= {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "bench",
        "font.size": 10,
        "axes.linewidth": 0.8,
    }
    values |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
    return values


def new(
    height: float, rows: int = 1, columns: int = 1, wide: bool = False, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure, and its axes row by row. height: in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE if wide else WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def svg(figure: Figure, prefix: str) -> str:
    """The SVG without prolog; its ids are unique in the page, and its ink follows the page's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{prefix}-", text)
    return text.replace(INK, "var(--ink, #7b818c)")


def colors(report: Report) -> dict[str, str]:
    """A color a contender, the same in every plot; the bundle's own is the first."""
    names = list(dict.fromkeys(result.name for result in report.results))
    return {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}


def dashes(report: Report, name: str) -> str:
    """A contender's kind of line, which tells it from another of its color."""
    return DASHES[list(colors(report)).index(name) // len(COLORS) % len(DASHES)]


def grid(axes: Axes, axis: str) -> None:
    axes.grid(axis=axis, color=INK, alpha=0.22, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def line(
    axes: Axes, report: Report, result: Result, x: Sequence[float], y: Sequence[float], **more: Any
) -> None:
    own = result.name == report.results[0].name
    axes.plot(
        x, y, color=colors(report)[result.name], label=result.label, linewidth=2.2 if own else 1.3,
        zorder=3 if own else 2, linestyle=dashes(report, result.name), **more,
    )  # fmt: skip


def legend(figure: Figure, axes: Axes) -> None:
    """Above a plot; of many contenders, which have a wide one, at its side."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    long = max(map(len, unique), default=0) > 22
    aside = figure.get_figwidth() > WIDTH
    figure.legend(
        list(unique.values()), [str(name) for name in unique], frameon=False, fontsize=9, columnspacing=1.4,
        loc="outside right upper" if aside else "outside upper left", handlelength=2.2 if aside else 1.4,
        ncols=1 if aside or long else 3,
    )  # fmt: skip
