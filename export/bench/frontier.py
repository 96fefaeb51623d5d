"""Quality over speed, a point a contender; the frontier: none is both faster and nearer than one on it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from stillgraph.exporter.bench.measures import at_first_setting, tpot
from stillgraph.exporter.bench.report import Report
from stillgraph.exporter.bench.style import INK, Drawn, colors, grid, legend, new

LEAST = 1e-4  # nats: a hundredth of what few bits cost; fp32's 1e-10 would leave the rest of the axis empty
MARKERS = "os^D"  # of the first contenders, which have a color each, and of those after them


def quality_over_speed(report: Report) -> Drawn:
    """Mean KL divergence over median TPOT, of at least two contenders that have both."""
    known = [
        (result, (statistics.median(times), max(LEAST, result.quality.kl.value)))
        for result in at_first_setting(report)
        if result.quality is not None and (times := result.values(tpot))
    ]
    if len(known) < 2:
        return
    figure, (axes,) = new(4.2, wide=True)
    edge = frontier(point for _, point in known)
    axes.step(*zip(*edge, strict=True), where="post", color=INK, linewidth=1.2, linestyle="--", alpha=0.7)
    own, color = report.results[0].name, colors(report)
    for place, (result, (time, kl)) in enumerate(known):
        size, marker = 11 if result.name == own else 7, MARKERS[place // 8 % len(MARKERS)]
        axes.plot(
            [time], [kl], marker, markersize=size, color=color[result.name], label=result.label, linestyle=""
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as formulas, which SVG text has not
    axes.set_xscale("log", subs=(2, 3, 5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("TPOT, ms")
    axes.set_ylabel("KL divergence, nats")
    grid(axes, "both")
    axes.margins(0.06, 0.08)
    legend(figure, axes)
    text = (
        "Left is faster, down is nearer to PyTorch fp32; none beats in both what is on the dashed line."
        f" {report.texts or ''} What is below {LEAST:g} stands at it."
    )
    yield "Quality over speed", text, figure


def frontier(points: Iterable[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The (time, error) that no other is at most as slow and at most as wrong as, by time."""
    kept: list[tuple[float, float]] = []
    for time, error in sorted(points):
        if not kept or error < kept[-1][1]:
            kept.append((time, error))
    return kept
