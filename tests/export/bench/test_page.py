"""The benchmark page: what it says, that it stands alone, and that odd reports do not break it."""

from __future__ import annotations

import builtins
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bench.page import headline, page
from stillgraph.exporter.bench.report import MemoryTrace, Report, Result, Setting

sys.path.insert(0, str(Path(__file__).parent))
import example

pytest.importorskip("matplotlib", reason="plots need matplotlib")


def html_of(report: Report) -> str:
    return page(report, example.COLUMNS, example.rows(report))


@pytest.fixture(scope="module")
def full() -> str:
    return html_of(example.full())


def test_headline_says_how_much_faster_and_smaller() -> None:
    own, other = (example.result(kind, Setting(), turns=1) for kind in example.KINDS[:2])
    other = other.model_copy(
        update={
            "runs": tuple(
                run.model_copy(
                    update={
                        "ttft_ms": 2 * run.ttft_ms,
                        "peak_pss_mb": 4 * (run.peak_pss_mb or 0),
                        "step_ms": tuple(3 * ms for ms in run.step_ms),
                    }
                )
                for run in own.runs
            )
        }
    )
    assert headline(example.report_of(own, other)) == (
        "Stillgraph int4 is 2.00 times as fast to the first token and 3.00 times as fast per later token as "
        "llama.cpp Q4_0, with 75 % less memory (peak PSS)."
    )


def test_page_stands_alone(full: str) -> None:
    assert "<script" not in full
    assert not re.search(r'(src|href)="(?!#|data:)', full)
    assert not re.search(r"url\((?!#)|@import", full)


def test_ids_are_unique_and_references_lead_somewhere(full: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', full)
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', full)
    assert used
    assert {a or b for a, b in used} <= set(ids)


def test_tags_balance(full: str) -> None:
    void, stack = {"meta", "link"}, []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in void:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

    Balance().feed(full)
    assert not stack


def test_plots_of_every_kind_with_searchable_text(full: str) -> None:
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", full)
    assert titles == [
        "Time to first token",
        "Time per output token",
        "Peak memory",
        "Time per token over position",
        "Memory over time",
        "TTFT over tokens of the prompt",
        "TPOT over tokens of the prompt",
        "prefill: time by op type",
        "prefill: time by layer",
        "decode: time by op type",
        "decode: time by layer",
    ]
    for word in ("MatMulNBits", "llama.cpp Q4_0", "decode"):
        assert re.search(rf"<text[^>]*>{re.escape(word)}</text>", full)


def test_failed_contender_says_why(full: str) -> None:
    assert "not measured: no wheel for Python 3.11; pip install mlc" in full


def test_text_is_escaped() -> None:
    bad = example.result(example.KINDS[0], Setting(), label="<b>&x")
    html = html_of(example.report_of(bad, command="a <script> b"))
    assert "<script>" not in html
    assert "<b>" not in html


def test_page_is_reproducible(full: str) -> None:
    assert html_of(example.full()) == full


KIND, SETTING = example.KINDS[0], Setting()
ODD = {
    "nothing": [],
    "no runs": [Result(name="a", label="A", setting=SETTING)],
    "one run": [example.result(KIND, SETTING, turns=1)],
    "no PSS": [
        example.result(kind, SETTING, runs=(example.run(0, kind, pss=False),), memory=None)
        for kind in example.KINDS[:2]
    ],
    "no PSS of one": [
        example.result(KIND, SETTING),
        example.result(example.KINDS[1], SETTING, runs=(example.run(0, KIND, pss=False),)),
    ],
    "one token": [example.result(kind, Setting(new_tokens=1)) for kind in example.KINDS[:2]],
    "two tokens": [example.result(KIND, Setting(new_tokens=2))],
    "no samples": [example.result(KIND, SETTING, memory=MemoryTrace(samples=(), marks=()))],
    "one sample, no marks": [
        example.result(KIND, SETTING, memory=MemoryTrace(samples=((1.0, 2.0),), marks=()))
    ],
    "reference failed": [
        example.result(KIND, SETTING),
        Result(name="llama-q4_0", label="L", setting=SETTING, note="killed"),
    ],
    "dollar signs": [example.result(KIND, SETTING, label="a $x_1$ b")],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error::UserWarning")
def test_odd_reports(name: str) -> None:
    html = html_of(example.report_of(*ODD[name]))
    assert html.rstrip().endswith("</html>")
    assert "nan" not in re.sub(r"<[^>]*>", "", html)


def test_dollar_signs_are_no_formula() -> None:
    assert ">a $x_1$ b</text>" in html_of(example.report_of(*ODD["dollar signs"]))


def test_missing_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StillgraphError, match=r"pip install 'stillgraph\[bench\]'"):
        html_of(example.report_of(example.result(KIND, SETTING)))
