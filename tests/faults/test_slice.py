"""A few of the trials that have random input, on the mock model; `make faults` has the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from stillgraph import load
from stillgraph.engine import Engine
from stillgraph.errors import StillgraphError
from stillgraph.files import describe
from stillgraph.manifest import Manifest, read
from tests.faults import damages, hostile, mutate
from tests.faults.outcome import Outcome, Tally, Trial, outcome

SEED = int(os.environ.get("SEED", "1"))
DEMO = Path(__file__).parents[2] / "export" / "demo" / "demo_checkpoint"
PROMPT = [7, 3, 9, 4, 8]


def tried(trial: Trial, count: int) -> Tally:
    tally = Tally("")
    for number in range(count):
        tally.add(trial(number))
    assert tally.bad == []
    return tally


def tokens(engine: Engine, count: int = 8) -> list[int]:
    return [step.token for step in engine.stream(PROMPT, max_new_tokens=count, stop_tokens=())]


@pytest.fixture
def bundle(bundle_of: Callable[..., Path]) -> Path:
    """The mock model's bundle, with all its files in the manifest, and their page sums."""
    folder = bundle_of()
    manifest = read(folder)
    graphs = {
        name: graph.model_copy(update={"file": describe(folder, folder / graph.file.path)})
        for name, graph in manifest.graphs.items()
    }
    weights = manifest.weights.model_copy(update={"file": describe(folder, folder / "weights.data")})
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = tuple(describe(folder, folder / name) for name in names)
    whole: Manifest = manifest.model_copy(update={"graphs": graphs, "weights": weights, "files": files})
    (folder / "manifest.json").write_text(whole.to_json(), encoding="utf-8")
    return folder


def test_damages_are_told_or_do_no_harm(bundle: Path, tmp_path: Path, greedy) -> None:
    def right(copy: Path) -> bool:
        with load(copy, threads=1) as engine:
            return tokens(engine) == greedy(PROMPT, 8, 261)

    assert right(bundle)
    tally = tried(damages.damage_trial(bundle, right, SEED, tmp_path), 60)
    assert tally.counts["refused"] > 30


def test_no_damage_is_left_out() -> None:
    data = bytes(range(256)) * 64
    changes = [damages.damaged(data, Random(number)) for number in range(300)]
    assert {how.split()[0] for _, how in changes} == {
        "flip", "flips", "zeros", "noise", "cut", "swap", "insert", "lost"
    }  # fmt: skip
    assert all(changed != data for changed, _ in changes)


def test_hostile_manifests(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    counts = tried(hostile.manifest_trial(bundle, manifest, SEED, PROMPT), 60).counts
    assert counts["refused"] > 20


def test_hostile_templates() -> None:
    valid = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    counts = tried(hostile.template_trial(valid, SEED), 150).counts
    assert min(counts["right"], counts["refused"]) > 10


def test_hostile_arguments(engine_of, greedy) -> None:
    engine, _ = engine_of(8, 64)
    counts = tried(hostile.argument_trial(engine, PROMPT, greedy(PROMPT, 8, 11), SEED), 200).counts
    assert min(counts["right"], counts["refused"]) > 10


def test_a_document_is_the_same_of_the_same_seed() -> None:
    tree = {"a": [1, {"b": None}], "c": "d"}
    texts = [mutate.document(tree, Random(number)) for number in range(50)]
    assert texts == [mutate.document(tree, Random(number)) for number in range(50)]
    assert len(set(texts)) > 30
    assert tree == {"a": [1, {"b": None}], "c": "d"}


def raises(error: Exception) -> bool:
    raise error


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: True, "right"),
        (lambda: False, "wrong"),
        (lambda: raises(StillgraphError("a", "b", "c")), "refused"),
        (lambda: raises(StillgraphError("a", "b\n", "c")), "raw"),
        (lambda: raises(KeyError("a")), "raw"),
    ],
)
def test_an_outcome_is_what_it_says(call, kind) -> None:
    assert outcome(call).kind == kind


def test_a_table_counts_and_a_bad_outcome_fails() -> None:
    tally = Tally("some")
    assert tally.failed
    for kind in ("right", "refused", "right"):
        tally.add(Outcome(kind))
    assert not tally.failed
    tally.add(Outcome("wrong", "that"))
    assert (tally.failed, tally.bad, tally.counts["right"]) == (True, ["wrong: that"], 2)
