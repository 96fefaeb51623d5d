"""Bundles made in one or in several exports: what is in them, and what a later export must not touch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stillgraph.exporter.bundle import build as under_test
from stillgraph.exporter.bundle import calling
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.config import ExportConfig
from stillgraph.files import check_files
from stillgraph.manifest import Manifest, read
from stillgraph.spec import GraphShape

Refused = Callable[..., AbstractContextManager[None]]
PREFILL = GraphShape(role="prefill", max_len=16, ctx=40)
DECODE = GraphShape(role="decode", max_len=1, ctx=40)


class Apart(NamedTuple):
    """A prefill, then a decode sent into the same bundle, and what the bundle was in between."""

    out: Path
    first: Manifest
    files: dict[str, bytes]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make(model: Path, out: Path, *shapes: GraphShape, replace: bool = False) -> Manifest:
    return export(ExportConfig(model=str(model), out=out), list(shapes), replace, say=lambda line: None)


@pytest.fixture(scope="module")
def apart(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Apart:
    out = tmp_path_factory.mktemp("apart") / "bundle"
    first = make(tiny_checkpoint(), out, PREFILL)
    files = contents(out)
    make(tiny_checkpoint(), out, DECODE)
    return Apart(out, first, files)


@pytest.fixture
def own(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle that a test may change, alone in its folder."""
    return shutil.copytree(tiny_bundle(), tmp_path / "place" / "own")


def test_what_is_in_a_bundle(tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> None:
    bundle = tiny_bundle()
    manifest = read(bundle)
    check_files(bundle, manifest, hashes=True)
    listed = {file.path for file in manifest.all_files()} | {"manifest.json"}
    assert set(contents(bundle)) == listed
    assert listed >= {"prefill-16.onnx", "decode-40.onnx", "weights.data", "tokenizer.json"}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (bundle / name).read_bytes() == (tiny_checkpoint() / name).read_bytes()
    assert (manifest.calling.tokens.bos, manifest.calling.tokens.pad, manifest.calling.tokens.stop) == (
        2,
        0,
        (1, 5),
    )
    aliases = {(alias.output, alias.input) for alias in manifest.graphs["decode-40"].aliases}
    assert ("present.1.value", "past_key_values.1.value") in aliases
    assert len(aliases) == 4


def test_the_simplify_report_has_every_graph(tiny_bundle: Callable[..., Path]) -> None:
    report = json.loads((tiny_bundle() / under_test.SIMPLIFY_REPORT).read_text())
    assert set(report["graphs"]) == set(report["worst_difference"]) == {"prefill-16", "decode-40"}
    steps = report["graphs"]["decode-40"]
    assert steps[0]["nodes_before"] > steps[-1]["nodes_after"]
    assert all(value <= 1e-5 for value in report["worst_difference"].values())


def test_a_second_export_adds_its_graph_and_reuses_the_weights(apart: Apart) -> None:
    second = read(apart.out)
    check_files(apart.out, second, hashes=True)
    assert set(apart.first.graphs) == {"prefill-16"}
    assert set(second.graphs) == {"prefill-16", "decode-40"}
    assert second.graphs["prefill-16"] == apart.first.graphs["prefill-16"]
    assert second.weights == apart.first.weights
    after = contents(apart.out)
    changed = {name for name, content in apart.files.items() if after[name] != content}
    assert changed == {"manifest.json", under_test.SIMPLIFY_REPORT}
    report = json.loads(after[under_test.SIMPLIFY_REPORT])
    assert set(report["graphs"]) == {"prefill-16", "decode-40"}


def test_in_two_exports_or_in_one_the_graphs_are_the_same(
    apart: Apart, tiny_bundle: Callable[..., Path]
) -> None:
    together = read(tiny_bundle())
    assert read(apart.out).graphs == together.graphs
    assert read(apart.out).weights == together.weights


def test_another_graph_of_a_role_takes_the_place_of_the_first(
    own: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    prefill = GraphShape(role="prefill", max_len=8, ctx=40)
    manifest = make(tiny_checkpoint(), own, prefill)
    assert set(manifest.graphs) == {"prefill-8", "decode-40"}
    assert {path.name for path in own.glob("*.onnx")} == {"prefill-8.onnx", "decode-40.onnx"}
    assert [path.name for path in own.parent.iterdir()] == ["own"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_system_with_links_or_without(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "new").mkdir()
    under_test.carry_over(own, tmp_path / "new", read(own))
    carried = contents(tmp_path / "new")
    assert carried == {name: content for name, content in contents(own).items() if name != "manifest.json"}
    same = (own / "weights.data").samefile(tmp_path / "new" / "weights.data")
    assert same is links


def test_a_former_weights_file_does_not_grow_under_its_bundle(
    own: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous bundle's files are carried over as hard links: appending through one would change it."""
    # As if the previous bundle lacked a weight that the new graph needs: forget one, and keep its bytes.
    manifest = read(own)
    tensors = dict(manifest.weights.tensors)
    del tensors["model.layers.0.mlp.up_proj.weight.transpose"]
    weights = manifest.weights.model_copy(update={"tensors": tensors})
    (own / "manifest.json").write_text(manifest.model_copy(update={"weights": weights}).to_json())
    before = contents(own)

    def fail(*_: object) -> None:
        grown = next(own.parent.glob(".own.staging-*")) / "weights.data"
        assert grown.stat().st_size > len(before["weights.data"])
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(under_test, "_write_simplify_report", fail)
        with pytest.raises(ZeroDivisionError):
            make(tiny_checkpoint(), own, DECODE)
    assert contents(own) == before
    made = make(tiny_checkpoint(), own, DECODE)
    check_files(own, read(own), hashes=True)
    assert made.weights.tensors.keys() == manifest.weights.tensors.keys()
    assert made.weights.file.nbytes > len(before["weights.data"])
    assert [path.name for path in own.parent.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("content", "word"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"eos_token_id": "end"}', "stop"),
     ('{"bos_token_id": -1}', "bos")],
)  # fmt: skip
def test_bad_generation_config_is_found_before_the_work(
    refused: Refused,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    word: str,
) -> None:
    monkeypatch.setattr(under_test, "convert", lambda *_: pytest.fail("work was done"))
    model = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    (model / "generation_config.json").write_text(content)
    with refused("read checkpoint", "generation_config.json", word):
        make(model, tmp_path / "out", DECODE)
    assert not (tmp_path / "out").exists()


def test_special_tokens_come_from_the_config_where_nothing_else_names_them(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = shutil.copytree(tiny_checkpoint(), tmp_path / "model")
    (model / "generation_config.json").unlink()
    tokens = calling.tokens(under_test.open_checkpoint(str(model)))
    assert (tokens.bos, tokens.pad, tokens.stop) == (2, 0, (1,))


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_bundle_gets_no_graph(
    refused: Refused,
    own: Path,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    monkeypatch.setattr(under_test, "convert", lambda *_: pytest.fail("work was done"))
    path = own / "weights.data"
    content = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(content[:-1])
    with refused("load bundle", "weights.data", "bundle again"):
        make(tiny_checkpoint(), own, DECODE)


def test_a_bundle_ships_one_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever files the checkpoint has of it; none where it has none, and where it has them no more."""
    model, out = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model")), tmp_path / "out"
    named = json.loads((model / "tokenizer_config.json").read_text())
    named |= {
        "chat_template": (model / "chat_template.jinja").read_text(),
        "tokenizer_class": "GPT2Tokenizer",
    }
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    state = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "vocab.json").write_text(json.dumps(state["vocab"]))
    (model / "merges.txt").write_text("#version: 0.2\n")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (model / name).unlink()
    three = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    manifest = make(model, out, DECODE)
    assert three < {file.path for file in manifest.files}
    assert (manifest.calling.tokens.bos, manifest.calling.tokens.template_adds_bos) == (2, True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (model / name).unlink()
    manifest = make(model, out, PREFILL)
    check_files(out, manifest)
    assert not three & {file.path for file in manifest.files}
    assert not three & {path.name for path in out.iterdir()}
    assert manifest.calling.tokens.template_adds_bos is None


def touch(path: Path) -> None:
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize("change", [touch, Path.unlink], ids=["written to", "removed"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_that_changes_while_it_is_read(
    tiny_checkpoint: Callable[..., Path], own: Path, tmp_path: Path, refused: Refused, name: str, change: Any
) -> None:
    """The bundle would have weights of one and the hash of the other."""
    model, before = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model")), contents(own)
    kept = (model / name).read_bytes()
    config = ExportConfig(model=str(model), out=own)

    def say(line: str) -> None:
        if line.startswith("tracing"):
            change(model / name)
            # Weights are still to be read, from a file that has the same numbers.
            (model / name).write_bytes(kept)

    with refused("read checkpoint", name, "changed"):
        export(config, [DECODE], True, say)
    assert contents(own) == before


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(
    tiny_checkpoint: Callable[..., Path], own: Path, tmp_path: Path, refused: Refused, bad: float
) -> None:
    from safetensors.torch import load_file, save_file

    model, before = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model")), contents(own)
    tensors, name = load_file(model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, model / "model.safetensors")
    with refused("read checkpoint", name, "1 of 3840 numbers", "NaN"):
        make(model, own, DECODE, replace=True)
    assert contents(own) == before
