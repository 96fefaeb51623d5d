"""The page of a benchmark: whole, self-contained, and drawn by a browser without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from runtime.bench.page import headline, page
from runtime.bench.report import Hotspot, Machine, Memory, Profile, Report, Result, Run, Setting
from runtime.bench.table import cells, columns

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --enable-logging=stderr --window-size=1100,5000"
).split()
# Writes, for each plot, whether it has an area on the screen.
BOXES = """<script>document.title = [...document.querySelectorAll("svg")].map(svg => {
const box = svg.getBoundingClientRect(); return box.width > 200 && box.height > 50; }).join(" ");</script>"""


def run(turn: int, scale: float) -> Run:
    return Run(
        turn=turn, load_ms=500 * scale, first_ttft_ms=90 * scale, ttft_ms=80 * scale + turn,
        step_ms=tuple(10 * scale + step / 10 for step in range(6)), peak_rss_mb=900, peak_pss_mb=800 * scale,
        other_cores=0, tokens=(1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip


def result(name: str, scale: float, setting: Setting, **more) -> Result:
    memory = Memory(
        samples=((0, 50), (300, 600), (600, 800)), marks=((0, "load"), (300, "prefill"), (400, "decode"))
    )
    runs = tuple(run(turn, scale) for turn in (1, 2, 3))
    return Result(name=name, label=name, setting=setting, runs=runs, memory=memory, exact=True, **more)


def report(*settings: Setting, **more) -> Report:
    results = [
        found
        for setting in settings
        for found in (
            result("Stillgraph <fast>", 0.5, setting, weights_mb=500, read_mb=480, versions={"ort": "1"}),
            result("torch", 1.0, setting),
            Result(name="gone", label="gone", setting=setting, note="it was killed"),
        )
    ]
    machine = Machine(cpu="a CPU", cores=2, memory_gb=24, system="Linux", bandwidth=30)
    return Report(
        date="2026-01-01", command="stillgraph bench <b>", model="m", machine=machine, reference="torch",
        turns=3, results=tuple(results), **more,
    )  # fmt: skip


SPOTS = (Hotspot(name="MatMul", ms=5.0, calls=3), Hotspot(name="layer 0", ms=2.0, calls=1))
PROFILE = Profile(graph="decode", runs=4, total_ms=8.0, by_op=SPOTS, by_layer=SPOTS)
SWEEP = (Setting(), Setting(prompt_tokens=512))


def html(found: Report) -> str:
    return page(found, columns(found), [cells(row, found) for row in found.results])


@pytest.mark.parametrize(
    ("found", "plots"),
    [
        (report(Setting()), 5),
        (report(*SWEEP), 7),
        (report(Setting(), profiles=(PROFILE,)), 6),
    ],
)
def test_every_plot_is_there_and_nothing_is_fetched(found, plots) -> None:
    text = html(found)
    assert text.count("<svg") == plots
    assert not re.findall(r"(?:src|href)=\"(?!#)", re.sub(r"xmlns:xlink=\"[^\"]*\"", "", text))
    assert "it was killed" in text
    assert "Stillgraph &lt;fast&gt;" in text
    assert "<fast>" not in text
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_headline_is_in_ratios() -> None:
    told = headline(report(Setting()))
    assert told.startswith("Stillgraph <fast> takes 0.51 of the TTFT, 0.51 of the TPOT, 0.50 of the peak PSS")


def test_a_report_without_runs_is_a_page() -> None:
    gone = Result(name="gone", label="gone", setting=Setting(), note="it was killed")
    found = Report(**(report(Setting()).model_dump() | {"results": (gone,)}))
    assert "it was killed" in html(found)
    assert "<svg" not in html(found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it(tmp_path, dark) -> None:
    text = html(report(*SWEEP, profiles=(PROFILE,)))
    (tmp_path / "bench.html").write_text(text.replace("</body>", BOXES + "</body>"), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [str(CHROMIUM), *FLAGS, *scheme, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, f"file://{tmp_path / 'bench.html'}"], capture_output=True, text=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert title[1].split() == ["true"] * 8
    assert "CONSOLE" not in done.stderr
