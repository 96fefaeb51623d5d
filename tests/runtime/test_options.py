"""Options of a request: each that cannot be used is one sentence, whatever its type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillgraph.options import Options
from stillgraph.sampling import Sampling

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("read options", {"max_new_tokens": 0}, "max_new_tokens is 0; give 1 or more"),
    ("read options", {"max_new_tokens": "5"}, "max_new_tokens is '5'; give 1"),
    ("read options", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ("read options", {"max_new_tokens": True}, "max_new_tokens is True"),
    ("read options", {"top_logprobs": -1}, "top_logprobs is -1; give 0 or more"),
    ("read options", {"top_logprobs": None}, "top_logprobs is None"),
    ("read options", {"stop_tokens": 5}, "stop_tokens is 5; give a list of token ids"),
    ("read options", {"stop_tokens": ["a"]}, "stop_tokens is ['a']"),
    ("read stop strings", {"stop": ""}, "a stop string is empty"),
    ("read stop strings", {"stop": ["a", ""]}, "a stop string is empty"),
    ("read stop strings", {"stop": ["a", 5]}, "a stop string is 5; give it as text"),
    ("read stop strings", {"stop": b"ab"}, "stop is b'ab'; give a text or a list of texts"),
    ("read stop strings", {"stop": 5}, "stop is 5; give a text"),
]
WRONG_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature is 'hot'; give a temperature of 0 (greedy) or more"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": None}, "temperature is None"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_k": 2.5}, "top_k is 2.5; give a top_k of 1 or more"),
    ({"top_p": "0.5"}, "top_p is '0.5'"),
    ({"min_p": [1]}, "min_p is [1]"),
    ({"repetition_penalty": "1"}, "repetition_penalty is '1'"),
    ({"seed": 1.5}, "seed is 1.5; give a seed of 0 or more"),
]


@pytest.mark.parametrize(("stage", "values", "said"), WRONG)
def test_a_wrong_option_is_one_sentence(refused: Any, stage: str, values: dict[str, Any], said: str) -> None:
    with refused(stage, said):
        Options(**values)


@pytest.mark.parametrize(("values", "said"), WRONG_SAMPLING)
def test_a_wrong_way_to_sample_is_one_sentence(refused: Any, values: dict[str, Any], said: str) -> None:
    with refused("read sampling options", said):
        Sampling(**values)


def test_numbers_of_numpy_are_numbers() -> None:
    sampling = Sampling(np.float32(0.5), np.int64(3), np.float64(0.5), np.float32(0.1), None, np.uint8(7))
    options = Options(sampling, np.int32(4), stop_tokens=np.array([3, 5]), top_logprobs=np.int64(2))
    assert options.ends([1]) == {3, 5}
    assert Options().ends([1]) == {1}
    assert Options(stop_tokens=()).ends([1]) == frozenset()
