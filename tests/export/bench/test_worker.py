"""One contender, measured in its own process: what counts, what does not, and what is told when it fails."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stillgraph.exporter.bench.contender import Contender
from stillgraph.exporter.bench.process import TurnFailed, run_once, take_turn
from stillgraph.exporter.bench.worker import Request, main, measure

CONTENDER = """
import os, signal, sys, time

class Fake:
    facts = {{"versions": {{"fake": "1"}}, "weights_mb": 3.0}}
    swap_seconds = 0.0

    def generate(self, ids, count):
        for index in range(count):
            {body}
            yield ids[0] + index

def open_contender(request):
    {opening}
    return Fake()
"""


def contender(folder: Path, body: str = "pass", opening: str = "pass") -> Contender:
    file = folder / "fake.py"
    file.write_text(CONTENDER.format(body=body, opening=opening), encoding="utf-8")
    return Contender("fake", "Fake", "fake", file, "none")


def request(tokens: int = 4) -> Request:
    return Request("none", [5, 6], tokens, 1, 64, {})


def test_a_run_has_its_tokens_and_facts(tmp_path) -> None:
    turn = run_once(contender(tmp_path), request(), 3)
    assert turn.run.turn == 3
    assert turn.run.tokens == (5, 6, 7, 8)
    assert len(turn.run.step_ms) == 3
    assert turn.facts == {"versions": {"fake": "1"}, "weights_mb": 3.0}
    assert turn.memory is None


def test_the_uncounted_run_samples_memory(tmp_path) -> None:
    slow = contender(tmp_path, opening="held = bytearray(80_000_000); time.sleep(0.5)")
    memory = take_turn(slow, request(), 0, 0).memory
    assert memory is not None
    assert max(mb for _, mb in memory.samples) > 80
    assert [what for _, what in memory.marks] == [
        "load", "first request", "prefill", "decode", "request", "prefill", "decode",
    ]  # fmt: skip
    assert [at for at, _ in memory.marks] == sorted(at for at, _ in memory.marks)
    assert memory.marks[0][0] >= 0


def test_ttft_is_the_median_of_three_requests(tmp_path, monkeypatch) -> None:
    """Prefills of 9, 2, 1 and 5 seconds by the clock: the first warms up, the slow one is not the figure."""
    monkeypatch.setattr("time.clock", [0.0], raising=False)
    monkeypatch.setattr("time.prefills", [9.0, 2.0, 1.0, 5.0], raising=False)
    monkeypatch.setattr("time.perf_counter", lambda: time.clock[0])  # type: ignore[attr-defined]
    slow = contender(tmp_path, body="time.clock[0] += 0.5 if index else time.prefills.pop(0)")
    row = main(str(slow.file), request())
    assert row["first_ttft_ms"] == pytest.approx(9000)
    assert row["ttft_ms"] == pytest.approx(2000)
    assert row["step_ms"] == pytest.approx([500, 500, 500])
    assert len(row["tokens"]) == 4


class Swapping:
    """Loads a graph for `swap` clock seconds before the tokens at `swap_at`; each token takes one second."""

    facts: dict = {}  # noqa: RUF012
    swap_seconds = 0.0

    def __init__(self, clock: list[float], swap_at: tuple[int, ...]) -> None:
        self.clock, self.swap_at = clock, swap_at

    def generate(self, ids, count):
        for index in range(count):
            if index in self.swap_at:
                self.clock[0] += 10.0
                self.swap_seconds += 10.0
            self.clock[0] += 1.0
            yield index


def test_loading_graphs_is_in_neither_ttft_nor_tpot(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    row = measure(Swapping(clock, swap_at=(0, 1)), [1], 4, [])
    assert row["ttft_ms"] == pytest.approx(1000)
    assert row["step_ms"] == pytest.approx([1000, 1000, 1000])
    assert row["swap_ms"] == pytest.approx(20000)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"opening": "raise ValueError('no such model')"}, "no such model"),
        ({"body": "os.kill(os.getpid(), signal.SIGKILL)"}, "runs out of memory"),
        ({"body": "os.kill(os.getpid(), signal.SIGSEGV)"}, "SIGSEGV"),
        ({"body": "return"}, "made 0 tokens instead of 4"),
        ({"opening": "os._exit(0)"}, "printed no result"),
    ],
)
def test_a_contender_that_fails_says_why(tmp_path, parts, words) -> None:
    with pytest.raises(TurnFailed, match=words):
        run_once(contender(tmp_path, **parts), request(), 1)


def test_one_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("stillgraph.exporter.bench.process.TIMEOUT_S", 0.3)
    with pytest.raises(TurnFailed, match="not done after"):
        run_once(contender(tmp_path, body="time.sleep(60)"), request(), 1)
