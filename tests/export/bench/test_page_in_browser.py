"""The page in a real browser: plots have a size, none is wider than the page, nothing is logged as an
error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stillgraph.exporter.bench.page import page
from stillgraph.exporter.ship.browser import chromium

sys.path.insert(0, str(Path(__file__).parent))
import example

pytest.importorskip("matplotlib", reason="plots need matplotlib")
CHROMIUM = chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom""".split()
PROBE = """<pre id="probe"></pre><script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
const outside = [...document.querySelectorAll("svg")].filter(s => { const o = s.getBoundingClientRect();
  return [...s.querySelectorAll("text")].some(t => { const r = t.getBoundingClientRect();
    return r.left < o.left - 2 || r.right > o.right + 2; }); }).length;
document.getElementById("probe").textContent = JSON.stringify({
  boxes: [...document.querySelectorAll("svg")].map(box), outside,
  ink: getComputedStyle(document.querySelector("svg text")).fill,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  wide: document.documentElement.scrollWidth, view: innerWidth });
</script></body>"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_plots_are_drawn(tmp_path: Path, dark: bool) -> None:
    assert CHROMIUM is not None
    report = example.full()
    html = page(report, example.COLUMNS, example.rows(report))
    copy = tmp_path / "bench.html"
    copy.write_text(html.replace("</body>", PROBE), encoding="utf-8")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    size = ["--window-size=500,900" if dark else "--window-size=1280,900"]
    command = [CHROMIUM, *FLAGS, *scheme, *size, f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout)[0])
    assert "CONSOLE" not in done.stderr
    assert found["dark"] is dark
    assert len(found["boxes"]) == html.count("<svg") == 11
    assert all(width > 200 and height > 80 for width, height in found["boxes"])
    assert found["outside"] == 0
    assert found["wide"] <= found["view"]
    assert found["ink"] == ("rgb(169, 176, 188)" if dark else "rgb(91, 98, 110)")
