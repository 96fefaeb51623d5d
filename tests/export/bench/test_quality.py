"""Quality in a benchmark: each contender's own logits against PyTorch's, by hand and for real."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stillgraph.exporter.bench.contender import Contender, ContenderSource
from stillgraph.exporter.bench.contenders.catalog import find
from stillgraph.exporter.bench.frontier import frontier, quality_over_speed
from stillgraph.exporter.bench.interleave import Entry
from stillgraph.exporter.bench.lineup import open_subject
from stillgraph.exporter.bench.page import headline
from stillgraph.exporter.bench.quality import Scoring, compare, logits_of, scoring_of
from stillgraph.exporter.bench.report import Report, Result, Run, Setting
from stillgraph.exporter.bench.style import svg
from stillgraph.exporter.bench.table import brief, brief_columns
from stillgraph.exporter.bench.variants import subject
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.validate.chunks import Chunks
from stillgraph.manifest import read

BASE = Setting(prompt_tokens=4, new_tokens=4, ctx=64, threads=1)
FAKE = """
import array

class Fake:
    swap_seconds, facts = 0.0, {{}}
    def generate(self, ids, count):
        yield from [1] * count
    {method}

def open_contender(request):
    return Fake()
"""
LOGITS = "def logits(self, ids, first): return (array.array('f', {values}) for _ in ids[first:])"
HALF, QUARTER = math.log(0.5), math.log(0.25)
TRUTH = [HALF, QUARTER, QUARTER]


def fake(folder: Path, name: str, values: list[float] | None, method: str = "") -> Contender:
    file = folder / f"{name}.py"
    method = method or (LOGITS.format(values=values) if values else "")
    file.write_text(FAKE.format(method=method), encoding="utf-8")
    return Contender(name, name, name, file, "none")


def chunks(*rows: list[int]) -> Chunks:
    return Chunks("a text", "0", np.array(rows, np.int64))


def test_statistics_are_those_of_the_formula() -> None:
    truth, found = np.array([TRUTH], np.float32), np.array([[QUARTER, HALF, QUARTER]], np.float32)
    same, other = compare(truth, truth, [0]), compare(truth, found, [0])
    assert (same.kl.value, same.same_top.value, same.ratio.value) == (0, 1, 1)
    assert other.kl.value == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert other.same_top.value == 0
    assert other.perplexity.value == pytest.approx(4, rel=1e-6)
    assert other.original_perplexity.value == pytest.approx(2, rel=1e-6)


def test_each_contender_is_asked_once_and_says_why_it_has_none(tmp_path) -> None:
    made = {
        "same": fake(tmp_path, "same", TRUTH),
        "other": fake(tmp_path, "other", [QUARTER, HALF, QUARTER]),
        "silent": fake(tmp_path, "silent", None),
        "wide": fake(tmp_path, "wide", [*TRUTH, 0.0]),
        "infinite": fake(tmp_path, "infinite", None, LOGITS.format(values="[float('inf'), 0, 0]")),
        "short": fake(
            tmp_path, "short", None, "def logits(self, ids, first): yield array.array('f', [0] * 3)"
        ),
        "broken": fake(
            tmp_path, "broken", None, "def logits(self, ids, first): raise SystemExit('no memory')"
        ),
    }
    entries = [Entry(one, BASE) for one in made.values()]
    entries += [Entry(made["other"], BASE.model_copy(update={"prompt_tokens": 8}))]
    entries += [Entry(fake(tmp_path, "absent", TRUTH), BASE, note="not installed")]
    said: list[str] = []
    texts = [chunks([1, 0, 1, 0, 2, 1], [1, 1, 1, 0, 0, 0])]
    Scoring(texts, fake(tmp_path, "torch", TRUTH), tmp_path / "work").score(entries, said.append)
    found = {entry.contender.name: entry.quality for entry in entries}
    assert found["same"].kl.value == 0
    assert found["same"].positions == 4  # positions 3 and 4 of each of two chunks of 6
    assert found["other"].kl.value == pytest.approx(0.25 * math.log(2), rel=1e-6)
    # The text goes on with 2, 1, 0, 0, to which it gives 1/4, 1/2, 1/4, 1/4.
    assert found["other"].perplexity.value == pytest.approx(2 ** (7 / 4), rel=1e-6)
    assert entries[-2].quality is found["other"]
    assert found["absent"] is None
    assert {name: found[name] for name in ("silent", "wide", "infinite", "short", "broken")} == {
        "silent": "no quality: it gives no logits",
        "wide": "no quality: 4 logits a token where PyTorch has 3",
        "infinite": "no quality: its logits are not finite",
        "short": "no quality: it gave logits of 2 of 4 tokens",
        "broken": "no quality: it ended with exit code 1: no memory",
    }
    assert len(said) == 1 + len(made)
    assert list((tmp_path / "work").iterdir()) == []
    silent = next(entry.result() for entry in entries if entry.contender.name == "silent")
    assert (silent.quality, silent.note) == (None, found["silent"])


@pytest.mark.parametrize("kind", ["torch", "portable", "scaled head"])
def test_logits_are_those_of_the_model(kind, tiny_bundle, tmp_path) -> None:
    """Of the first half as a prompt and the rest token by token, against one pass of transformers."""
    bundle = tiny_bundle()
    manifest = read(bundle)
    checkpoint = open_checkpoint(manifest.source.id)
    rows = [[2, 7, 9, 30, 31, 8, 60, 61, 200]]
    source = ContenderSource(manifest.source.id, checkpoint.sha256, tmp_path, tmp_path, 40)
    made = find(source)[0] if kind == "torch" else subject(bundle, manifest)
    found = logits_of(Entry(made, BASE.model_copy(update={"ctx": 40})), rows, tmp_path / "f", lambda _: None)
    assert not isinstance(found, str), found
    with torch.no_grad():
        truth = checkpoint.load()(torch.tensor(rows)).logits[0, 4:-1].numpy()
    if kind == "scaled head":
        wrong = compare(truth, 1.5 * found, rows[0][5:])
        assert wrong.kl.value > 0.01
        assert wrong.same_top.value == 1
    else:
        np.testing.assert_allclose(found, truth, rtol=0, atol=1e-4)


def test_texts_are_those_of_validation_or_ones_own(tiny_bundle, tmp_path, refused) -> None:
    bundle = tiny_bundle()
    source = ContenderSource(read(bundle).source.id, "", tmp_path, tmp_path, 40)
    (shipped,) = scoring_of(open_subject(bundle), source, [], "quick").texts
    assert shipped.name == "prose.txt"
    assert shipped.ids.shape == (1, 40)
    own = tmp_path / "own.txt"
    own.write_text("Once upon a time. " * 80, encoding="utf-8")
    scoring = scoring_of(open_subject(bundle), source, [own], "default")
    assert [text.ids.shape for text in scoring.texts] == [(2, 40)]
    assert "2 of 40 tokens of own.txt" in scoring.told()
    with refused("read text", "missing.txt"):
        scoring_of(open_subject(bundle), source, [tmp_path / "missing.txt"], "quick")


def result(name: str, tpot: float, truth: list[float], found: list[float]) -> Result:
    run = Run(
        turn=1, load_ms=1, first_ttft_ms=1, ttft_ms=1, step_ms=(tpot,), peak_rss_mb=1, peak_pss_mb=1,
        other_cores=0, tokens=(1, 2),
    )  # fmt: skip
    quality: Any = compare(np.array([truth], np.float32), np.array([found], np.float32), [0])
    return Result(name=name, label=name, setting=BASE, runs=(run,), quality=quality)


def test_the_table_and_the_plot_show_it(make_report) -> None:
    exact, wrong = result("a", 5.0, TRUTH, TRUTH), result("b", 2.0, TRUTH, [QUARTER, HALF, QUARTER])
    bare = result("c", 1.0, TRUTH, TRUTH).model_copy(update={"quality": None})
    report = make_report(exact, wrong, bare)
    columns, row = brief_columns(report), brief(wrong, report)
    assert row[columns.index("KL nats")] == "0.17"
    assert row[columns.index("same top")] == "0.0%"
    assert brief(bare, report)[columns.index("KL nats")] == "-"
    ((_, text, figure),) = quality_over_speed(report)
    assert "over a text" in text
    edge, *points = figure.axes[0].get_lines()
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [
        (5.0, 1e-4),
        (2.0, pytest.approx(0.25 * math.log(2), rel=1e-6)),
    ]
    assert list(edge.get_xdata()) == [2.0, 5.0]
    assert "$" not in svg(figure, "f")
    said = headline(make_report(wrong, exact).model_copy(update={"reference": "a"}))
    assert said.endswith(
        "; 0% of its best tokens are those of PyTorch fp32, and the KL divergence is 0.17 nats."
    )
    assert Report.model_validate_json(report.to_json()) == report
    none = make_report(bare)
    assert "KL nats" not in brief_columns(none)
    assert list(quality_over_speed(none)) == []


@pytest.fixture
def make_report() -> Any:
    from stillgraph.exporter.bench.report import Machine

    machine = Machine(cpu="a CPU", cores=2, memory_gb=24, system="Linux", bandwidth=30)

    def make(*results: Result) -> Report:
        return Report(
            date="now", command="bench", model="m", machine=machine, reference=results[0].name, turns=1,
            results=results, texts="over a text",
        )  # fmt: skip

    return make


def test_the_frontier_is_what_none_is_better_than() -> None:
    points = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.6), (2.0, 0.2), (4.0, 0.1), (5.0, 0.05)]
    assert frontier(points) == [(1.0, 0.5), (2.0, 0.2), (3.0, 0.1), (5.0, 0.05)]


# llama.cpp has full layers at every sixth place of a Gemma 3 alone.
GEMMA = {"family": "gemma3", "layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 24}


@pytest.mark.parametrize("config", [GEMMA, {"family": "llama"}], ids=["gemma3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_for_llama_cpp_holds_the_checkpoint(
    config, dtype, tiny_checkpoint, tmp_path, monkeypatch
) -> None:
    """As transformers reads it, which puts rows and norms back in its own order."""
    from safetensors.torch import load_file, save_file
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    kinds = {f"LLAMA_FTYPE_MOSTLY_{name}": 0 for name in ("Q4_0", "Q4_K_M", "IQ4_NL", "Q8_0")}
    stand_in = SimpleNamespace(**kinds, llama_log_callback=lambda function: function)
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", stand_in)
    from stillgraph.exporter.bench.contenders.llamacpp import write_gguf

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source = tiny_checkpoint(**config)
    model = open_checkpoint(str(source)).load()
    tensors = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    write_gguf(folder, tmp_path / "m.gguf")
    read_back = load_gguf_checkpoint(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=model)
    found = read_back["tensors"]
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_allclose(
            np.asarray(found[name], np.float32), value.float().numpy(), rtol=0, atol=2e-7
        )
