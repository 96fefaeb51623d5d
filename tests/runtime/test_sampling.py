"""Sampling against transformers' own processors, and its draws against the distribution they leave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stillgraph.errors import StillgraphError
from stillgraph.sampling import Forced, Sampler, Sampling, likeliest

IDS = [3, 17, 3, 40, 5]
CASES = [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
    ({"temperature": 1.0, "top_k": 5000}, [TopKLogitsWarper(5000)]),
    ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"temperature": 1.0, "top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    ({"temperature": 1.0, "top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
    ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    ({"repetition_penalty": 1.4}, [RepetitionPenaltyLogitsProcessor(1.4)]),
    ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    (
        {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
]


def scores(seed: int, size: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@pytest.mark.parametrize(("options", "warpers"), CASES)
@pytest.mark.parametrize("seed", range(5))
def test_processors_equal_those_of_transformers(options, warpers, seed) -> None:
    logits = scores(seed)
    before, ours = logits.copy(), logits
    for process in Sampling(**options).processors():
        ours = process(ours, IDS)
    theirs = LogitsProcessorList(warpers)(torch.tensor([IDS]), torch.from_numpy(logits)[None])[0].numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the order of float32 sums differs
    np.testing.assert_array_equal(logits, before)


def test_the_order_is_that_of_generate() -> None:
    """Each of these orders keeps another set of tokens, so a changed order fails one of the seeds."""
    config = {"temperature": 2.0, "top_k": 20, "top_p": 0.7, "min_p": 0.2}
    names = [process.__qualname__.split(".")[0] for process in Sampling(**config).processors()]
    assert names == ["temperature", "top_k", "top_p", "min_p"]


def test_greedy_takes_the_likeliest_and_its_log_probability() -> None:
    logits = scores(1)
    token, logprob = Sampler(Sampling())(logits, IDS)
    assert token == logits.argmax()
    assert logprob == pytest.approx(float(torch.log_softmax(torch.from_numpy(logits), 0)[token]), abs=1e-6)


def test_the_log_probability_is_the_models_own_whatever_the_sampling() -> None:
    logits = scores(2)
    token, logprob = Sampler(Sampling(temperature=5.0, top_k=3, repetition_penalty=2.0, seed=0))(logits, IDS)
    assert logprob == pytest.approx(float(torch.log_softmax(torch.from_numpy(logits), 0)[token]), abs=1e-6)


@pytest.mark.parametrize("count", [1, 3, 200, 5000])
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_the_likeliest_are_those_of_torch(count, shift) -> None:
    """Logits far from zero would overflow, or lose all digits, in an exponent that is not shifted."""
    logits = scores(3) + np.float32(shift)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    order = expected.sort(descending=True, stable=True).indices[:count].tolist()
    found = likeliest(logits, count)
    assert [token for token, _ in found] == order
    np.testing.assert_allclose([logprob for _, logprob in found], expected[order], rtol=0, atol=1e-6)


def test_none_of_the_likeliest_is_none() -> None:
    assert likeliest(scores(3), 0) == []


def test_forced_tokens_have_their_own_log_probability_and_are_followed_by_the_likeliest() -> None:
    logits, forced = scores(4), Forced([7, 9])
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    found = [forced(logits, []) for _ in range(3)]
    assert [token for token, _ in found] == [7, 9, int(logits.argmax())]
    for token, logprob in found:
        assert logprob == pytest.approx(float(expected[token]), abs=1e-6)
    kept = forced.logits
    np.testing.assert_array_equal(kept, logits)
    logits[:] = 0
    assert kept.any(), "a graph writes its next logits into the same array"


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler(logits, [0])[0] for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.5, 0.3, 0.15, 0.05], atol=4 * math.sqrt(0.25 / 4000))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-8, 1e-39, 1e-320])
def test_next_to_no_temperature_is_greedy(temperature) -> None:
    logits = np.random.default_rng(0).normal(0, 100, 50).astype(np.float32)
    token, logprob = Sampler(Sampling(temperature=temperature, top_p=0.9, seed=0))(logits, IDS)
    assert (token, logprob) == Sampler(Sampling())(logits, IDS)


def test_draws_stay_within_what_is_kept() -> None:
    sampler = Sampler(Sampling(temperature=9.0, top_k=2, seed=0))
    assert {sampler(np.array([0.0, 4.0, 1.0, 3.0], np.float32), [0])[0] for _ in range(200)} == {1, 3}


def test_a_seed_repeats_and_another_does_not() -> None:
    def draw(seed: int, row: int = 0) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), row)
        return [sampler(scores(0), [0])[0] for _ in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(7) != draw(7, row=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty is 1e-45"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is 1e"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range_are_refused(options, said) -> None:
    with pytest.raises(StillgraphError, match=said):
        Sampling(**options)
