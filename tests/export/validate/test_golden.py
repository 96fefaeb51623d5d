"""golden.json: PyTorch's tokens and logits, with which our own engine is checked as any other."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import stillgraph
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.config import request
from stillgraph.exporter.validate.validate import validate
from stillgraph.golden import GOLDEN, Answer, Case, Golden, compare, read
from stillgraph.manifest import read as read_manifest
from stillgraph.spec import GraphShape

Bundle = Callable[..., Path]
CTX = 40  # of the tiny bundles; P = 16, W = 5


def validated(bundle: Path, place: Path) -> tuple[Path, Golden]:
    own = Path(shutil.copytree(bundle, place))
    validate(own, depth="quick", say=lambda line: None)
    return own, read(own)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    return validated(tiny_bundle(), tmp_path_factory.mktemp("golden") / "plain")


@pytest.fixture(scope="module")
def seeing(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    shapes = [("prefill", 16, 40), ("decode", 1, 40)]
    bundle = tiny_bundle(shapes=shapes, family="gemma3_vision")
    return validated(bundle, tmp_path_factory.mktemp("golden") / "seeing")


def picture_of(case: Case) -> list[Image.Image]:
    if case.picture_png is None:
        return []
    return [Image.open(io.BytesIO(base64.b64decode(case.picture_png)))]


def kept(call: Callable[[Any], Any], seen: list[np.ndarray]) -> Callable[[Any], Any]:
    """A call of a graph whose logits are kept."""

    def wrapped(given: Any) -> Any:
        logits = call(given)
        seen.append(logits[0].copy())
        return logits

    return wrapped


def answers(bundle: Path, golden: Golden) -> list[Answer]:
    """Our own engine's, with the logits that its graphs give it."""
    found, seen = list[Answer](), list[np.ndarray]()
    with stillgraph.load(bundle) as engine:
        for name in ("prefill", "decode"):
            setattr(engine.graphs, name, kept(getattr(engine.graphs, name), seen))
        for case in golden.cases:
            seen.clear()
            steps = list(
                engine.stream(case.prompt, images=picture_of(case), max_new_tokens=case.max_new_tokens)
            )
            reason = str(steps[-1].finish_reason)
            found.append(Answer(tuple(step.token for step in steps), reason, dict(enumerate(seen))))
    return found


def test_cases_cross_every_edge(plain: tuple[Path, Golden]) -> None:
    bundle, golden = plain
    made = {case.name: (len(case.prompt), case.finish_reason) for case in golden.cases}
    stops = made.pop("stops")
    assert stops[1] == "stop"
    assert made == {
        "one_token": (1, "length"),
        "across_window": (3, "length"),
        "across_chunks": (33, "context"),
        "context_end": (37, "context"),
    }
    assert all(case.tokens[-1] in (1, 5) for case in golden.cases if case.finish_reason == "stop")
    assert GOLDEN in {file.path for file in read_manifest(bundle).files}


@torch.no_grad()
def test_tokens_and_logits_are_those_of_transformers(plain: Any, original: Callable[[str], Any]) -> None:
    """Over the whole text each time, without a cache."""
    bundle, golden = plain
    model = original(read_manifest(bundle).source.id)
    for case in golden.cases:
        text = torch.tensor([[*case.prompt, *case.tokens[:-1]]])
        logits = model(input_ids=text).logits[0, len(case.prompt) - 1 :].numpy()
        assert tuple(logits.argmax(-1)) == case.tokens, case.name
        for listed in case.logits:
            np.testing.assert_allclose(listed.values, logits[listed.step][list(listed.ids)], atol=1e-4)
            assert set(np.argsort(-logits[listed.step])[:16]) <= set(listed.ids)
        assert {0, len(case.tokens) - 1} <= {listed.step for listed in case.logits}


def test_the_picture_is_seen(seeing: Any, follows: Callable[..., bool]) -> None:
    bundle, golden = seeing
    (case,) = (case for case in golden.cases if case.name == "picture")
    (drawn,) = picture_of(case)
    assert drawn.size == (24, 24)
    with stillgraph.load(bundle) as engine:
        steps = list(engine.stream(case.prompt, images=[drawn], max_new_tokens=case.max_new_tokens))
    assert tuple(step.token for step in steps) == case.tokens
    checkpoint = read_manifest(bundle).source.id
    assert follows(steps, checkpoint, list(case.prompt), [drawn], len(steps))


@pytest.mark.parametrize("which", ["plain", "seeing"])
def test_our_engine_passes(which: str, request: pytest.FixtureRequest) -> None:
    bundle, golden = request.getfixturevalue(which)
    for case, answer in zip(golden.cases, answers(bundle, golden), strict=True):
        compared = compare(case, answer, golden.tolerance)
        assert compared.problems == ()
        assert compared.steps == len(case.logits)
        assert compared.worst < 1e-5
        assert (compared.equal, compared.near_tie) == (len(case.tokens), None)


def test_a_graph_added_takes_it_away(plain: tuple[Path, Golden], tmp_path: Path) -> None:
    """It is of the graphs that were proven."""
    own = Path(shutil.copytree(plain[0], tmp_path / "own"))
    config = request(
        model=read_manifest(own).source.id, target="portable", precision="fp32", batch=1, out=own
    )
    shape = GraphShape(role="prefill", batch=1, max_len=8, ctx=CTX)
    export(config, [shape], replace=False, say=lambda line: None)
    assert not (own / GOLDEN).exists()
    assert GOLDEN not in {file.path for file in read_manifest(own).files}
