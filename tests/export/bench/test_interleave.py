"""Turns, what they leave behind, and what is refused before any of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillgraph.errors import StillgraphError
from stillgraph.exporter.bench.contender import Contender, Making
from stillgraph.exporter.bench.interleave import Entry, check, ids_of, measure, prepare, prompt_ids, sweep
from stillgraph.exporter.bench.process import TurnFailed
from stillgraph.exporter.bench.report import (
    Machine,
    Report,
    Result,
    Run,
    Setting,
    Spread,
    ratio,
    tpot_percentile,
)
from stillgraph.exporter.bench.table import cells, columns, disagreements, equal_tokens, markdown
from stillgraph.spec import ModelSpec, VisionSpec

BASE = Setting(prompt_tokens=4, new_tokens=4, ctx=64, threads=1)
MACHINE = Machine(cpu="a CPU", cores=2, memory_gb=24, system="Linux", bandwidth=30)

MODEL = ModelSpec(
    architecture="Any", vocab_size=100, hidden_size=2, num_attention_heads=1,
    max_position_embeddings=64, layers=(),
)  # fmt: skip
VISION = VisionSpec(channels=1, height=2, width=2, image_tokens=3, image_token=20, mark="<image>")
SEEING = MODEL.model_copy(update={"vision": VISION})


def run(turn: int, ttft: float = 10.0, step: float = 2.0, tokens: tuple[int, ...] = (1, 2, 3)) -> Run:
    return Run(
        turn=turn, load_ms=5, first_ttft_ms=12, ttft_ms=ttft, step_ms=(step, step), peak_rss_mb=9,
        peak_pss_mb=8, other_cores=0, tokens=tokens,
    )  # fmt: skip


def result(name: str, *runs: Run, exact: bool = True, **more) -> Result:
    return Result(name=name, label=name, setting=BASE, exact=exact, runs=runs, **more)


def report(*results: Result, turns: int = 2) -> Report:
    return Report(
        date="now", command="stillgraph bench", model="m", machine=MACHINE, reference=results[0].name,
        turns=turns, results=results,
    )  # fmt: skip


def entry(name: str, tmp_path, **more) -> Entry:
    return Entry(Contender(name, name, name, tmp_path / "none.py", "model", **more), BASE)


@pytest.fixture
def turns_taken(monkeypatch):
    """(contender, turn) of every process that was asked for; the contender `bad` fails in its second turn."""
    taken: list[tuple[str, int]] = []

    def take(contender, request, turn, patience):
        taken.append((contender.name, turn))
        if contender.name == "bad" and turn == 2:
            raise TurnFailed("it fell over")
        return SimpleNamespace(run=run(turn), facts={"weights_mb": 1.0}, memory=None)

    monkeypatch.setattr("stillgraph.exporter.bench.interleave.take_turn", take)
    return taken


def test_contenders_take_turns_after_one_that_is_not_counted(tmp_path, turns_taken) -> None:
    entries = [entry("a", tmp_path), entry("b", tmp_path)]
    measure(entries, MODEL, 2, 0, lambda text: None, lambda: None)
    assert turns_taken == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [found.turn for found in entries[0].result().runs] == [1, 2]
    assert entries[0].result().weights_mb == 1.0


def test_one_that_fails_keeps_its_rows_and_stops_nothing(tmp_path, turns_taken) -> None:
    entries = [entry("bad", tmp_path), entry("b", tmp_path)]
    saved = count()
    measure(entries, MODEL, 3, 0, lambda text: None, lambda: next(saved))
    bad, good = (found.result() for found in entries)
    assert [found.turn for found in bad.runs] == [1]
    assert bad.note == "it fell over (turn 2)"
    assert len(good.runs) == 3
    assert ("bad", 3) not in turns_taken
    assert next(saved) == 7  # after each run, the failed one too


def test_what_cannot_be_made_or_run_is_a_row_that_says_so(tmp_path, turns_taken) -> None:
    fails = (sys.executable, "-c", "import sys; sys.exit('no disk left')")
    writes = (sys.executable, "-c", f"open({str(tmp_path / 'model')!r}, 'w')")
    entries = [
        entry("absent", tmp_path, missing="not installed: pip install it"),
        entry("unmade", tmp_path, prepare=(Making(tmp_path / "never", fails),)),
        entry("made", tmp_path, prepare=(Making(tmp_path / "model", writes),)),
    ]
    prepare(entries, lambda text: None)
    measure(entries, MODEL, 1, 0, lambda text: None, lambda: None)
    notes = [found.result().note for found in entries]
    assert notes == ["not installed: pip install it", "it cannot be made: no disk left", None]
    assert {name for name, _ in turns_taken} == {"made"}


def test_ratios_are_taken_within_a_turn() -> None:
    """A slow turn hits both, so it changes no ratio; medians of each would have given 1.0."""
    slow = result("slow", run(1, ttft=10), run(2, ttft=100), run(3, ttft=20))
    fast = result("fast", run(1, ttft=5), run(2, ttft=50), run(4, ttft=999))
    assert ratio(fast, slow, lambda r: r.ttft_ms) == 0.5
    assert ratio(fast, result("none"), lambda r: r.ttft_ms) is None


def test_spread_and_percentile() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 9.0])
    assert spread == Spread(median=3.0, mean=4.0, least=1.0, most=9.0)
    assert Spread.of([]) is None
    steps = Run(**run(1).model_dump() | {"step_ms": tuple(float(step) for step in range(1, 101))})
    assert tpot_percentile(result("r", steps), 0.95) == 95.0
    assert tpot_percentile(result("r"), 0.95) is None


def test_tokens_are_compared_with_the_exact_reference() -> None:
    same, other = run(1, tokens=(1, 2, 3)), run(1, tokens=(1, 9, 3))
    found = report(result("torch", same), result("fp32", other), result("int4", other, exact=False))
    assert [equal_tokens(row, found) for row in found.results] == [(3, 3), (1, 3), (1, 3)]
    assert disagreements(found) == ["fp32"]
    unsteady = report(result("torch", same), result("int4", same, run(2, tokens=(7, 7, 7)), exact=False))
    assert disagreements(unsteady) == ["int4"]


def test_a_table_has_every_cell_of_rows_with_and_without_runs() -> None:
    found = report(result("torch", run(1), run(2)), result("gone", note="it fell over"), result("b", run(1)))
    head = columns(found)
    rows = [cells(row, found) for row in found.results]
    assert {len(row) for row in rows} == {len(head)}
    at = {heading: index for index, heading in enumerate(head)}
    assert rows[0][at["TPOT ms"]] == "2.0 (2.0-2.0)"
    assert rows[1][at["note"]] == "it fell over"
    assert rows[1][at["TPOT ms"]] == "-"
    text = markdown(found)
    assert "| gone | - |" in text
    assert "stillgraph bench" in text


def test_a_markdown_report_has_a_chart_of_each_measure() -> None:
    text = markdown(
        report(result("torch", run(1), run(2)), result("gone", note="it fell over"), result("b", run(1)))
    )
    assert text.count("```mermaid") == 3
    assert text.count('x-axis ["torch", "b"]') == 3
    assert "bar [2.0, 2.0]" in text
    assert "mermaid" not in markdown(report(result("torch", run(1))))


def test_a_report_survives_its_file() -> None:
    found = report(result("torch", run(1)))
    assert Report.model_validate_json(found.to_json()) == found


def test_prompts_are_the_same_for_all_and_within_the_vocabulary() -> None:
    assert prompt_ids(50, 20) == prompt_ids(60, 20)[:50]
    assert set(prompt_ids(500, 20)) <= set(range(10, 20))
    assert set(prompt_ids(9, 5)) == {4}


def test_a_sweep_varies_one_thing() -> None:
    found = sweep("prompt=16,32", BASE)
    assert [(s.prompt_tokens, s.ctx, s.new_tokens) for s in found] == [(16, 64, 4), (32, 64, 4)]


@pytest.mark.parametrize("option", ["depth=1", "prompt", "prompt=x", "ctx=0", "threads=-1"])
def test_a_sweep_that_makes_no_sense_is_refused(option, refused) -> None:
    with refused("bench", option, "prompt=16,128,512"):
        sweep(option, BASE)


def test_a_setting_over_the_cache_is_refused(refused) -> None:
    check(BASE.model_copy(update={"prompt_tokens": 61}))
    with refused("bench", "62", "64 slots"):
        check(BASE.model_copy(update={"prompt_tokens": 62}))
    with refused("bench", "one new token"):
        check(BASE.model_copy(update={"new_tokens": 1}))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_its_rows(bundle_of, tmp_path, how) -> None:
    bundle = bundle_of()
    command = [sys.executable, "-m", "stillgraph", "bench", str(bundle), "--against", "", "--turns", "1000"]
    command += [
        "--prompt-tokens",
        "2",
        "--new-tokens",
        "2",
        "--patience",
        "0",
        "--out",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path, rows = tmp_path / "out" / "bench.json", 0
    while rows < 2 and process.poll() is None:
        time.sleep(0.05)
        rows = len(json.loads(path.read_text())["results"][0]["runs"]) if path.exists() else 0
    process.send_signal(how)
    assert process.wait() != 0
    found = Report.model_validate_json(path.read_text(encoding="utf-8"))
    assert 2 <= len(found.results[0].runs) < 1000
    assert (tmp_path / "out" / "bench.md").exists() == (how == signal.SIGTERM)


def test_a_picture_s_tokens_are_among_the_prompt_s() -> None:
    plain = ids_of(BASE.model_copy(update={"prompt_tokens": 500}), SEEING)
    assert 20 not in plain
    assert 20 in prompt_ids(500, 100)
    ids = ids_of(BASE.model_copy(update={"prompt_tokens": 12, "image": "a.png"}), SEEING)
    assert len(ids) == 12
    assert ids == [*plain[:4], 20, 20, 20, *plain[7:12]]
    assert ids_of(BASE, MODEL) == prompt_ids(4, 100)


def test_one_that_does_not_see_is_given_no_picture(tmp_path) -> None:
    entries = [entry("a", tmp_path, sees=True), entry("b", tmp_path)]
    for found in entries:
        found.setting = BASE.model_copy(update={"image": "a.png"})
    prepare(entries, lambda text: None)
    assert [found.note for found in entries] == [None, "it is given no pictures here"]


@pytest.mark.parametrize(
    ("spec", "tokens", "words"),
    [
        (None, 12, "takes text alone"),
        (VISION, 7, "no room for a picture of 3 tokens"),
        (VISION, 8, "is not a file"),
    ],
)
def test_a_picture_that_cannot_be_asked_about(tmp_path, spec, tokens, words) -> None:
    image = tmp_path / "a.png"
    if words != "is not a file":
        image.touch()
    with pytest.raises(StillgraphError, match=words):
        check(BASE.model_copy(update={"prompt_tokens": tokens, "image": str(image)}), spec)


def test_time_of_vision_is_a_column_where_there_is_some() -> None:
    saw = run(1).model_copy(update={"vision_ms": 7.0})
    assert "| vision ms |" in markdown(report(result("torch", run(1)), result("b", saw)))
    assert "vision ms" not in markdown(report(result("torch", run(1))))


@pytest.mark.parametrize("absolute", [True, False])
def test_a_model_is_made_into_a_folder_that_is_not_there(tmp_path, monkeypatch, absolute: bool) -> None:
    """What writes a model does not make the folder: issue 13, llama.cpp as the first in a new --work."""
    monkeypatch.chdir(tmp_path)
    path = (tmp_path if absolute else Path()) / "new" / "0123" / "model.gguf"
    command = (sys.executable, "-c", "import sys; open(sys.argv[1], 'w').close()", str(path))
    first = entry("first", tmp_path, prepare=(Making(path, command),))
    prepare([first], lambda line: None)
    assert first.note is None
    assert path.is_file()
