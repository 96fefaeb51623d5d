"""Who is compared, by name; and what would compare unequal things."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stillgraph.cli import main
from stillgraph.exporter.bench.contender import Contender, ContenderSource, Making
from stillgraph.exporter.bench.lineup import lineup, open_subject
from stillgraph.exporter.bench.variants import form

SOURCE = ContenderSource("somewhere", "0" * 64, Path("work"), Path("work/models"), 1024)


@pytest.mark.parametrize(
    ("name", "words", "exact"),
    [
        ("portable", ["bundle", "--target", "portable"], True),
        ("portable-fp16", ["--precision", "fp16"], False),
        (
            "onnxruntime-int4-b32-fast",
            ["--precision", "int4", "--calibrate", "none", "--block-size", "32", "--fast-prefill"],
            False,
        ),
        ("onnxruntime+unload", ["--target", "onnxruntime", "--model"], True),
        ("dynamic", ["export", "dynamic"], True),
    ],
)
def test_a_name_says_how_its_bundle_is_made(name, words, exact) -> None:
    found = form(name, SOURCE)
    assert found is not None
    command = " ".join(found.prepare[0].command)
    assert " ".join(words) in command
    assert "--model somewhere" in command
    assert found.exact is exact


def test_how_a_form_is_run_changes_no_bundle() -> None:
    plain, other = form("onnxruntime-int8", SOURCE), form("onnxruntime-int8+compiled+unload", SOURCE)
    assert plain is not None
    assert other is not None
    assert other.model == plain.model
    assert (plain.options, other.options) == (
        {"compiled": "False", "unload": "False"},
        {"compiled": "True", "unload": "True"},
    )
    assert [making.path.name for making in other.prepare] == ["manifest.json", "compiled"]


@pytest.mark.parametrize(
    "name",
    ["int4", "onnxruntime-fp16", "portable+compiled", "portable-b32", "dynamic-int4", "portable-int4-fast"],
)
def test_no_other_name_is_a_form(name) -> None:
    assert form(name, SOURCE) is None


@pytest.fixture
def others(monkeypatch):
    found = [Contender(name, name, "peer", Path("x"), "x") for name in ("peer-a", "peer-b")]
    monkeypatch.setattr("stillgraph.exporter.bench.lineup.others", lambda source: found)


def chosen(bundle: Path, *against: str) -> list[str]:
    subject = open_subject(bundle)
    source = subject.source(Path("work"), None, subject.ctx)
    return [contender.name for contender in lineup(subject, source, against)]


def test_the_bundle_is_first_and_nobody_comes_twice(bundle_of, others) -> None:
    names = chosen(bundle_of(), "peer", "peer-b", "portable", "onnxruntime-int4", "onnxruntime-int4")
    assert names == ["portable", "peer-a", "peer-b", "onnxruntime-int4"]


def test_what_is_not_installed_is_a_row_with_its_remedy(bundle_of, others) -> None:
    subject = open_subject(bundle_of())
    found = lineup(subject, subject.source(Path("work"), None, subject.ctx), ["torch"])
    assert found[1].missing == "not installed: pip install 'stillgraph[export]'"


def test_an_unknown_name_is_refused(bundle_of, others, refused) -> None:
    with refused("bench", "'vllm'", "torch", "peer-a"):
        chosen(bundle_of(), "vllm")


def test_a_gguf_of_ones_own_is_run_by_llama_cpp_and_not_made(
    bundle_of, tmp_path, monkeypatch, refused
) -> None:
    own = tmp_path / "mine.Q4_K_M.gguf"
    own.touch()
    made = Contender(
        "llama-q8_0", "llama.cpp Q8_0", "llama", Path("x"), "models/llama-q8_0.gguf",
        prepare=(Making(Path("models/llama-q8_0.gguf"), ("false",)),),
    )  # fmt: skip
    monkeypatch.setattr("stillgraph.exporter.bench.lineup.others", lambda source: [made])
    subject = open_subject(bundle_of())
    source = subject.source(Path("work"), None, subject.ctx)
    found = lineup(subject, source, [str(own)])[1]
    assert (found.name, found.label) == ("mine.Q4_K_M.gguf", "llama.cpp mine.Q4_K_M")
    assert (found.model, found.file, found.prepare) == (str(own), made.file, ())
    with refused("bench", "missing.gguf", "a GGUF file"):
        lineup(subject, source, [str(tmp_path / "missing.gguf")])


def changed(bundle: Path, target: Path, change) -> Path:
    shutil.copytree(bundle, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_a_bundle_of_the_same_checkpoint_joins_by_its_folder(bundle_of, tmp_path, others) -> None:
    bundle = bundle_of()
    twin = changed(bundle, tmp_path / "twin", lambda manifest: None)
    assert chosen(bundle, str(twin)) == ["portable", "twin"]


def test_a_bundle_of_another_checkpoint_is_refused(bundle_of, tmp_path, others, refused) -> None:
    bundle = bundle_of()
    other = changed(bundle, tmp_path / "o", lambda m: m["source"].update(checkpoint_sha256="f" * 64))
    with refused("bench", "ffffffffffff", "one checkpoint"):
        chosen(bundle, str(other))


def test_bad_use_is_told_in_one_sentence(bundle_of, capsys, tmp_path) -> None:
    bundle = str(bundle_of())
    for args, word in (
        ([bundle, "--against", "vllm"], "'vllm'"),
        ([bundle, "--against", "vllm", "--against", "portable"], "'vllm'"),
        ([bundle, "--sweep", "depth=1"], "depth=1"),
        ([bundle, "--prompt-tokens", "100000"], "100000"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["bench", "--prompt-tokens", "4", "--new-tokens", "4", *args]) == 2
        told = capsys.readouterr().err
        assert word in told
        assert told.count("\n") == 1
