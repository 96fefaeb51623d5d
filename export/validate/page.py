"""The validation report as one self-contained HTML page, readable in light and dark."""

from __future__ import annotations

import io
from collections.abc import Callable

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator

from stillgraph.exporter.validate.report import (
    AGREEMENT_COLUMNS,
    BROKEN_COLUMNS,
    COLUMNS,
    Parity,
    agreement_row,
    broken_row,
    case_row,
)
from stillgraph.exporter.validate.table import NOTES, columns_of, overview, text_tables
from stillgraph.manifest import Manifest

INK = "#808691"  # reads on white and on black
COLORS = {True: "#3b82f6", False: "#f59e0b"}
FLOOR = 1e-9  # where the logarithmic axis puts an exact match

# The start of a page's style; `passed` is asked for when it is rendered.
STYLE = """<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-weight: 600; color: {{ "#16a34a" if passed else "#dc2626" }}; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #8884; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.broken { color: #dc2626; font-weight: 600; }
.scroll { overflow-x: auto; } code { font-size: .85em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dd { margin: 0; }
"""

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity of {{ name }}</title>
"""
    + STYLE
    + """.deployed th:nth-child(2), .deployed td:nth-child(2) { text-align: right; } h3 { font-size: .95rem; }
svg { width: 100%; height: auto; }
</style></head><body>
<h1>Parity with PyTorch: {{ name }}</h1>
<p class="verdict">{{ "Passed" if parity.passed else "FAILED" }}: worst relative error
{{ "%.1e" | format(parity.max_relative_error) }} of logits,
{{ "%.1e" | format(parity.max_cache_error) }} of keys and values,
top-1 agreement {{ "%.2f" | format(100 * parity.top1_agreement) }} %.</p>
<p>{{ parity.why_bound[0] | upper }}{{ parity.why_bound[1:] }}. The worst error is max |difference| over
max |value| of the reference, RMS the root mean square of differences over that of values. The largest error
over its bound is {{ "%.3g" | format(parity.worst_ratio) }}.</p>
{% for title, columns, rows in lists if rows %}<h2>{{ title }}</h2>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
<h2>Graphs as they run</h2><p>{{ notes }}</p>
{% for title, rows in deployed %}{% if title %}<h3>{{ title }}</h3>{% endif %}
<div class="scroll"><table class="deployed">
<thead><tr><th></th>{% for kind in parity.kinds %}<th>{{ kind.name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
{% for kind in parity.kinds if kind.layers %}<details><summary>Layers of {{ kind.name }}, the noisiest first
</summary><table><thead><tr><th>layer</th><th>keys, dB</th><th>values, dB</th></tr></thead>
<tbody>{% for layer in kind.noisiest %}<tr><td>{{ layer.layer }}</td>
<td>{{ "%.1f" | format(layer.keys) }}</td><td>{{ "%.1f" | format(layer.values) }}</td></tr>
{% endfor %}</tbody></table></details>{% endfor %}
{% if quality %}<h2>Quality of the quantized weights</h2>
<p>The errors above are of the graph, against PyTorch with the same quantized weights. This is what those
weights cost against the checkpoint's own, over {{ quality.positions }} positions of
{{ "a text" if quality.text else "random ids" }}:
mean KL divergence {{ "%.2e" | format(quality.kl) }} nats (bound {{ "%.1e" | format(quality.kl_bound) }}),
top-1 agreement {{ "%.1f" | format(100 * quality.top1_agreement) }} %,
perplexity {{ "%.3f" | format(quality.perplexity) }} where the checkpoint has
{{ "%.3f" | format(quality.original_perplexity) }} (bound: {{ quality.perplexity_bound }} times that)
{%- if quality.recall is not none %}, recall {{ "%.2f" | format(quality.recall) }} where the checkpoint has
{{ "%.2f" | format(quality.original_recall) }}{% endif %}.</p>{% endif %}
<dl>{% for term, value in facts %}<dt>{{ term }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl>
<h2>Error over positions</h2>{{ positions }}
<h2>Keys and values, per layer</h2>{{ layers }}
<h2>Cases</h2>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for broken, row in rows %}<tr{% if broken %} class="broken"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p>optimized: ONNX Runtime's own graph optimizations. prompt (given): the decode graph started from the
reference's keys and values. max, mean and relative: of logits. cache: the worst layer.</p>
</body></html>
""",
    autoescape=True,
)


def write_page(manifest: Manifest, parity: Parity) -> str:
    """The page's HTML."""
    columns = columns_of(manifest, parity)
    facts = [
        ("model", manifest.source.id),
        ("target, precision", f"{manifest.target}, {manifest.precision}"),
        ("graphs", ", ".join(manifest.graphs)),
        ("date, depth", f"{parity.date}, {parity.depth}"),
        ("CPU", parity.cpu),
        ("versions", ", ".join(f"{name} {version}" for name, version in parity.tools.items())),
        ("weights", parity.weights),
    ]
    html: str = PAGE.render(
        name=manifest.source.id,
        parity=parity,
        passed=parity.passed,
        quality=parity.quality,
        facts=facts,
        lists=[
            ("Broken bounds, the worst first", BROKEN_COLUMNS, [broken_row(*pair) for pair in parity.broken]),
            (
                "Logits against PyTorch with the same weights",
                AGREEMENT_COLUMNS,
                [agreement_row(found) for found in parity.agreements],
            ),
        ],
        deployed=[("", overview(columns)), *text_tables(columns)],
        notes=NOTES.replace("`", ""),
        columns=COLUMNS,
        rows=[(not parity.within_bound(case), case_row(case)) for case in parity.cases],
        positions=Markup(_figure(parity, _plot_positions)),
        layers=Markup(_figure(parity, _plot_layers)),
    )
    return html


def _figure(parity: Parity, plot: Callable[[Parity, Axes], None]) -> str:
    with mpl.rc_context({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
                         "ytick.color": INK, "svg.fonttype": "none", "svg.hashsalt": "parity"}):  # fmt: skip
        figure, axes = plt.subplots(figsize=(9, 3.2))
        figure.subplots_adjust(left=0.1, right=0.99, bottom=0.15, top=0.88)
        plot(parity, axes)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())  # as text: mathtext is most of drawing
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.18))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _plot_positions(parity: Parity, axes: Axes) -> None:
    for optimized, color in COLORS.items():
        points = [(c.position, c.relative_error) for case in parity.cases if case.optimized == optimized
                  for c in case.comparisons]  # fmt: skip
        if points:
            x, y = np.array(points).T
            label = f"optimizations {'on' if optimized else 'off'}"
            axes.scatter(x, np.maximum(y, FLOOR), s=7, color=color, label=label, alpha=0.6, linewidths=0)
    axes.set_xlabel("position")
    axes.set_ylabel("relative error of logits")


def _plot_layers(parity: Parity, axes: Axes) -> None:
    for optimized, color in COLORS.items():
        errors = np.array([case.cache_errors for case in parity.cases if case.optimized == optimized])
        if errors.size:
            worst = np.maximum(errors.max(axis=0), FLOOR)
            label = f"optimizations {'on' if optimized else 'off'}"
            axes.plot(range(len(worst)), worst, marker="o", markersize=4, color=color, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("worst relative error")
