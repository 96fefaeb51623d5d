"""PyTorch as a contender, run for real; and the peers, as far as can be said without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillgraph.exporter.bench.contender import ContenderSource
from stillgraph.exporter.bench.contenders.catalog import PEERS, find
from stillgraph.exporter.bench.contenders.transformers4 import folder_for_transformers4
from stillgraph.exporter.bench.interleave import Entry, prepare
from stillgraph.exporter.bench.process import TurnFailed, run_once
from stillgraph.exporter.bench.report import Setting
from stillgraph.exporter.bench.variants import subject
from stillgraph.exporter.bench.worker import Request
from stillgraph.manifest import read


def source(checkpoint: Path, work: Path, sha256: str = "0" * 64) -> ContenderSource:
    return ContenderSource(str(checkpoint), sha256, work, work / "models", 64)


def test_peers_that_are_not_installed_say_how_to_install_them(tmp_path) -> None:
    found = {contender.name: contender for contender in find(source(tmp_path, tmp_path / "work"))}
    assert found["torch"].missing is None
    assert len(found) == 2 + sum(len(peer.models) for peer in PEERS)
    for peer in PEERS:
        for contender in (c for c in found.values() if c.group == peer.name):
            assert (
                f"stillgraph.exporter.bench.contenders.install {peer.name} --work {tmp_path / 'work'}"
                in contender.missing
            )


def test_an_installed_peer_writes_its_models_from_the_checkpoint(tmp_path) -> None:
    python = tmp_path / "env" / "llama" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    found = [c for c in find(source(tmp_path, tmp_path)) if c.group == "llama"]
    assert [c.missing for c in found] == [None] * 7
    assert found[0].prepare[0].command[0] == str(python)
    assert found[0].prepare[0].command[3:5] == (str(tmp_path), str(tmp_path / "models"))
    (hub,) = (c for c in find(source(Path("org/model"), tmp_path)) if c.name == "llama-q8_0")
    assert "--model" in str(hub.missing)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("absolute", [True, False])
def test_each_peer_can_be_the_first_in_a_work_folder(peer, absolute, tmp_path, monkeypatch) -> None:
    """Its script gets folders that are there; an interpreter that writes empty models stands for it."""
    monkeypatch.chdir(tmp_path)
    checkpoint, work = tmp_path / "checkpoint", (tmp_path if absolute else Path()) / "work"
    checkpoint.mkdir()
    python = peer.python(work)
    python.parent.mkdir(parents=True)
    touched = "".join(f'touch "$4/{model}" || exit 1\n' for model in peer.models)
    python.write_text(f'#!/bin/sh\ntest "$2" = prepare && test -d "$3" || exit 1\n{touched}')
    python.chmod(0o755)
    made = ContenderSource(str(checkpoint), "0" * 64, work.resolve(), (work / "000000000000").resolve(), 64)
    setting = Setting(prompt_tokens=4, new_tokens=4, ctx=64, threads=1)
    entries = [Entry(c, setting) for c in find(made) if c.group == peer.name]
    prepare(entries, lambda line: None)
    assert [entry.note for entry in entries] == [None] * len(peer.models)


@pytest.mark.parametrize(("name", "dtype"), [("torch", torch.float32), ("torch-bf16", torch.bfloat16)])
def test_eager_makes_the_tokens_that_the_model_makes(tiny_checkpoint, tmp_path, name, dtype) -> None:
    from stillgraph.exporter.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    made = {c.name: c for c in find(source(tiny_checkpoint(), tmp_path, checkpoint.sha256))}[name]
    ids, count = [5, 9, 11], 12
    turn = run_once(made, Request(made.model, ids, count, 1, 64, made.options), 1)
    model = checkpoint.load().to(dtype)
    for token in turn.run.tokens:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids = [*ids, token]
    assert turn.facts["weights_mb"] == pytest.approx(sum(p.nbytes for p in model.parameters()) / 1e6)
    assert set(turn.facts["versions"]) == {"torch", "transformers"}


def test_a_picture_and_its_tokens(tiny_bundle, tmp_path) -> None:
    """PyTorch and a bundle of ours make the same of them, and both say what seeing took."""
    bundle, image = tiny_bundle(family="llava"), tmp_path / "a.png"
    manifest = read(bundle)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (14, 20, 3), np.uint8)).save(image)
    vision, folder = manifest.model.vision, Path(manifest.source.id)
    ids = [5, 9, *[vision.image_token] * vision.image_tokens, 11]
    eager = find(source(folder, tmp_path, manifest.source.checkpoint_sha256))[0]
    turns = [
        run_once(made, Request(made.model, ids, 8, 1, 40, made.options, str(image)), 1)
        for made in (eager, subject(bundle, manifest))
    ]
    assert turns[0].run.tokens == turns[1].run.tokens
    assert all(0 < turn.run.vision_ms < turn.run.ttft_ms for turn in turns)
    assert turns[0].facts["read_mb"] == pytest.approx(turns[1].facts["read_mb"], rel=0.1)


def test_another_checkpoint_than_the_bundle_s_is_told(tiny_checkpoint, tmp_path) -> None:
    made = find(source(tiny_checkpoint(), tmp_path))[0]
    with pytest.raises(TurnFailed, match="not the checkpoint that the bundle was made from"):
        run_once(made, Request(made.model, [5], 2, 1, 64, made.options), 1)


def test_what_transformers_4_reads(tiny_checkpoint, tmp_path) -> None:
    checkpoint = tiny_checkpoint()
    folder = folder_for_transformers4(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    rope = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]
    assert config["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert (folder / "model.safetensors").resolve() == (checkpoint / "model.safetensors").resolve()


def test_the_catalog_needs_none_of_the_libraries() -> None:
    libraries = {"torch", "llama_cpp", "openvino"}
    code = f"import sys, stillgraph.exporter.bench.contenders.catalog; print({libraries} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
