"""Scores, logits of all positions and likeliest tokens against transformers; mapped files after `close`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillgraph import load
from stillgraph.manifest import read

P, CTX = 16, 40  # of the bundles: the prompt is longer than a chunk, and than the window of 5
BOUND = 1e-5  # of the largest logit, as tests/export/conftest.py has it
BUNDLES: dict[str, dict[str, Any]] = {
    "portable": {},
    "onnxruntime": {"target": "onnxruntime"},
    "two rows": {"batch": 2},
    "growing": {"shapes": [("dynamic", CTX, CTX)]},
}
PICTURES: dict[str, Any] = {"shapes": [("prefill", 24, 64), ("decode", 1, 64)], "family": "gemma3_vision"}


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tiny_bundle: Any) -> Path:
    return Path(tiny_bundle(**BUNDLES[request.param]))


@pytest.fixture
def expected(bundle: Path, truth: Any) -> tuple[list[int], np.ndarray]:
    """Ids [N], and the logits [N, V] of transformers after each of them; N is the whole context."""
    found = truth(read(bundle).source.id, 1)
    return found.ids[0].tolist(), found.logits[0].astype(np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits), -1).numpy()


@pytest.mark.parametrize("start", [0, 1, P - 1, P, P + 3, CTX - 1])
def test_logits_of_all_positions_from_any(bundle: Path, expected: Any, start: int) -> None:
    ids, logits = expected
    found = list(load(bundle, threads=1).logits(ids, start=start))
    assert len(found) == CTX - start
    np.testing.assert_allclose(found, logits[start:], rtol=0, atol=BOUND * np.abs(logits).max())


@pytest.mark.parametrize("start", [1, P, CTX - 1])
def test_scores_are_log_probabilities_given_the_tokens_before(
    bundle: Path, expected: Any, start: int
) -> None:
    ids, logits = expected
    logprobs = log_softmax(logits)
    steps = list(load(bundle, threads=1).score(ids, start=start, top_logprobs=3))
    assert [step.token for step in steps] == ids[start:]
    wanted = [logprobs[position - 1, ids[position]] for position in range(start, CTX)]
    atol = 2 * BOUND * np.abs(logits).max()  # a logit's error, and that of the sum of them
    np.testing.assert_allclose([step.logprob for step in steps], wanted, rtol=0, atol=atol)
    for position, step in enumerate(steps, start):
        order = np.argsort(-logprobs[position - 1])[:3]
        assert [top.token for top in step.top_logprobs] == order.tolist()
        best = logprobs[position - 1, order]
        np.testing.assert_allclose([top.logprob for top in step.top_logprobs], best, rtol=0, atol=atol)


def test_another_continuation_finds_its_context_in_the_cache(bundle: Path, expected: Any) -> None:
    ids, logits = expected
    context, engine = ids[: P + 4], load(bundle, threads=1)
    for continuation in ([7, 8, 9], [7, 200], [3]):
        steps = list(engine.score([*context, *continuation], start=len(context)))
        assert [step.token for step in steps] == continuation
        first = log_softmax(logits)[len(context) - 1, continuation[0]]
        assert steps[0].logprob == pytest.approx(first, abs=2 * BOUND * np.abs(logits).max())
        assert engine.graphs.cached[0] == [*context, *continuation[:-1]]


def test_log_probabilities_are_of_the_raw_logits(bundle: Path, expected: Any) -> None:
    """Whatever temperature, top_k and repetition penalty make of them."""
    ids, logits = expected
    engine, prompt = load(bundle, threads=1), ids[:20]
    options: dict[str, Any] = {"temperature": 3.0, "top_k": 40, "repetition_penalty": 1.5, "seed": 1}
    (step,) = engine.stream(prompt, max_new_tokens=1, top_logprobs=5, **options)
    logprobs, atol = log_softmax(logits)[19], 2 * BOUND * np.abs(logits).max()
    assert step.logprob == pytest.approx(logprobs[step.token], abs=atol)
    assert step.token != logprobs.argmax(), "sampling changed nothing: choose another seed"
    order = np.argsort(-logprobs)[:5]
    assert [top.token for top in step.top_logprobs] == order.tolist()
    np.testing.assert_allclose([top.logprob for top in step.top_logprobs], logprobs[order], rtol=0, atol=atol)
    assert [top.text for top in step.top_logprobs] == [engine.decode([int(token)]) for token in order]


@pytest.mark.parametrize("start", [-1, 40, 1.5, "1", None])
def test_a_start_that_is_no_position_is_refused(tiny_bundle: Any, refused: Any, start: Any) -> None:
    engine = load(tiny_bundle(), threads=1)
    for call, least in ((engine.score, 1), (engine.logits, 0)):
        with refused("read options", f"start is {start!r} and the prompt has 40 tokens", f"give {least} or"):
            call([5] * 40, start=start)
    with refused("read options", "start is 0 and the prompt has 40 tokens; give 1 or more"):
        engine.score([5] * 40, start=0)


def test_scores_behind_a_picture(tiny_bundle: Any, drawn: Any, follows: Any, refused: Any) -> None:
    """What greedy steps of transformers say of their own tokens is what a score of the whole text says."""
    bundle = tiny_bundle(**PICTURES)
    engine, prompt, images = load(bundle, threads=1), "ab<start_of_image>c", [drawn(1)]
    steps = list(engine.stream(prompt, images=images, max_new_tokens=4, stop_tokens=()))
    ids = engine.ids(prompt)
    assert follows(steps, read(bundle).source.id, ids, images, 4)
    whole = [*ids, *(step.token for step in steps)]
    scores = list(engine.score(whole, start=len(ids), images=images))
    np.testing.assert_allclose(
        [score.logprob for score in scores], [step.logprob for step in steps], atol=1e-5
    )
    with refused("read options", "start is 3 and a picture comes behind it"):
        engine.score(whole, start=3, images=images)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_close_unmaps_the_weights(bundle: Path) -> None:
    def mapped() -> bool:
        return str((bundle / "weights.data").resolve()) in Path("/proc/self/maps").read_text()

    assert not mapped()
    with load(bundle, threads=1) as engine:
        stream = engine.stream([1, 2, 3], max_new_tokens=5)
        next(stream)
        next(stream)
        assert mapped()
    assert not mapped()
