"""The loop over real sessions of ONNX Runtime: what the mock cannot show about bindings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from stillgraph import load
from stillgraph.metrics import rss_mb

VOCAB = 261


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("unload", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8])
def test_greedy_tokens(bundle_of, greedy, continues: bool, unload: bool, length: int) -> None:
    engine = load(bundle_of(continues=continues), unload_prefill=unload, threads=1)
    prompt = [(7 * slot + 3) % VOCAB for slot in range(length)]
    tokens = [step.token for step in engine.stream(prompt, max_new_tokens=9)]
    assert tokens == greedy(prompt, 9, VOCAB)[: len(tokens)]
    assert len(tokens) == 9


def test_rows_over_one_graph(bundle_of, greedy) -> None:
    engine = load(bundle_of(batch=2), threads=1)
    prompts, rows = [[3, 4, 5], [7] * 20], [[], []]
    for row, step in engine.stream_batch(prompts, max_new_tokens=6):
        rows[row].append(step.token)
    assert rows == [greedy(prompt, 6, VOCAB) for prompt in prompts]


def test_a_prompt_in_chunks_up_to_the_last_slot(bundle_of, greedy) -> None:
    engine = load(bundle_of(max_len=8, ctx=20), threads=1)
    prompt = [(5 * slot + 2) % VOCAB for slot in range(18)]
    steps = list(engine.stream(prompt))
    assert [step.token for step in steps] == greedy(prompt, 3, VOCAB)
    assert steps[-1].finish_reason == "context"


def test_text_in_text_out(bundle_of, greedy) -> None:
    engine = load(bundle_of(), threads=1)
    steps = list(engine.stream("Once \u20ac", max_new_tokens=12))
    ids = engine.text.encode("Once \u20ac")
    assert ids[0] == 2
    assert [step.token for step in steps] == greedy(ids, 12, VOCAB)
    assert "".join(step.text for step in steps) == engine.text.decode([step.token for step in steps])


@pytest.mark.parametrize(("asked", "variable", "loaded"), [(None, "1", 1), (None, "0", 2), (False, "1", 2)])
def test_the_environment_asks_for_one_graph_at_a_time(
    bundle_of, monkeypatch, asked, variable, loaded
) -> None:
    monkeypatch.setenv("UNLOAD_PREFILL_BEFORE_DECODE", variable)
    graphs = load(bundle_of(), unload_prefill=asked).graphs
    assert graphs._prefill.loaded + graphs._decode.loaded == loaded


@pytest.mark.skipif(rss_mb() is None, reason="needs /proc")
@pytest.mark.parametrize("unload", [True, False])
def test_the_prefills_memory_is_back_with_the_system(bundle_of, unload: bool) -> None:
    engine = load(bundle_of(ballast_mb=64), unload_prefill=unload, threads=1)
    stream = engine.stream([5, 6], max_new_tokens=4)
    next(stream)
    with_prefill = rss_mb()
    next(stream)
    returned = with_prefill - rss_mb()
    assert returned > 50 if unload else returned < 10  # of 64 MB; the decode graph takes less than 1


def test_memory_is_measured() -> None:
    """In a small process: of one with torch, the pages of libraries count hundreds of MB less while another
    process maps them too. With 10 MB to spare for those of numpy."""
    script = """
import numpy as np
from stillgraph.metrics import PeakPss, peak_rss_mb, pss_mb, rss_mb
before = pss_mb()
with PeakPss() as peak:
    ballast = np.ones(64 * 2**20, np.uint8)
    peak.sample()
    del ballast
assert peak_rss_mb() >= rss_mb() - 1
assert before + 57 < peak.mb < before + 77, (before, peak.mb)
assert pss_mb() < peak.mb - 57, (pss_mb(), peak.mb)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(rss_mb() is None, reason="needs /proc")
def test_a_peak_is_not_that_of_the_process_before() -> None:
    """Which getrusage's is: what a process had before it became this one counts there."""
    script = """
import os, sys
import numpy as np
ballast = np.ones(200 * 2**20, np.uint8)
told = "from stillgraph.metrics import peak_rss_mb; print(peak_rss_mb())"
os.execv(sys.executable, [sys.executable, "-c", told])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert 5 < float(done.stdout) < 150
