"""A certificate as one self-contained HTML page, readable in light and dark."""

from __future__ import annotations

import jinja2

from stillgraph.certificate import Content
from stillgraph.exporter.validate.page import STYLE
from stillgraph.exporter.validate.report import COLUMNS, Parity, case_row

PAGE = jinja2.Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Proof of {{ title }}</title>
"""
    + STYLE
    + """code { overflow-wrap: anywhere; }
</style></head><body>
<h1>Proof of {{ title }}</h1>
<p class="verdict">{{ "Passed" if content.passed else "FAILED" }}</p>
{% for finding in content.findings %}<p>{{ finding }}</p>
{% endfor %}<p>This page and the files below are bound to each other by the hashes in the certificate beside
it, which <code>stillgraph prove --check</code> compares. It has no signature: it shows that files are those
that were proven, not who proved them.</p>
<h2>Bounds</h2>
<p>{{ parity.why_bound[0] | upper }}{{ parity.why_bound[1:] }}.</p>
<div class="scroll"><table>
<thead><tr><th>of</th><th>measure</th><th>worst</th><th>bound</th><th>broken</th><th>where</th></tr></thead>
<tbody>{% for v in content.verdicts %}<tr{% if v.broken %} class="broken"{% endif %}><td>{{ v.of }}</td>
<td>{{ v.measure }}</td><td>{{ "%.2e" | format(v.value) }}</td><td>{{ "%.2e" | format(v.bound) }}</td>
<td>{{ v.broken }}</td><td>{{ v.where }}</td></tr>
{% endfor %}</tbody></table></div>
<h2>Where</h2>
<dl>{% for term, value in facts %}<dt>{{ term }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl>
{% for title, files in lists %}<h2>{{ title }}</h2>
<div class="scroll"><table><thead><tr><th>file</th><th>SHA-256</th><th>bytes</th></tr></thead>
<tbody>{% for file in files %}<tr><td>{{ file.path }}</td><td><code>{{ file.sha256 }}</code></td>
<td>{{ "{:,}".format(file.nbytes) }}</td></tr>
{% endfor %}</tbody></table></div>
{% endfor %}<h2>Cases</h2>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for broken, row in rows %}<tr{% if broken %} class="broken"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</body></html>
""",
    autoescape=True,
)


def write_page(content: Content, parity: Parity) -> str:
    """The page's HTML. The page itself is not among its files."""
    facts = [
        ("checkpoint", content.checkpoint),
        *content.identity.items(),
        ("date, depth", f"{content.date}, {parity.depth}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in content.versions.items())),
        ("CPU", content.cpu),
        ("its flags", " ".join(content.cpu_flags)),
    ]
    kinds = {"bundle": "Files of the bundle", "graph": "Files of the graph"}
    html: str = PAGE.render(
        title=f"a {content.subject} of {content.checkpoint}",
        content=content,
        passed=content.passed,
        parity=parity,
        facts=facts,
        lists=[
            (kinds[content.subject], content.files),
            ("Files of the checkpoint", content.checkpoint_files),
        ],
        columns=COLUMNS,
        rows=[(not parity.within_bound(case), case_row(case)) for case in parity.cases],
    )
    return html
