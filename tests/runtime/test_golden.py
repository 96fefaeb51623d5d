"""The check of a runtime's answer: each kind of wrong answer is told, and a near tie is not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillgraph.golden import GOLDEN, Answer, Case, Golden, StepLogits, Tolerance, compare, read

TOLERANCE = Tolerance(logits=0.001, near_tie=0.002)
CASE = Case(
    name="one_token",
    prompt=(2,),
    max_new_tokens=4,
    tokens=(3, 1, 4),
    finish_reason="stop",
    logits=(
        StepLogits(step=0, ids=(3, 7, 0), values=(8.0, 7.99, -10.0)),  # a tie: 0.02 is near
        StepLogits(step=2, ids=(4, 0, 7), values=(5.0, 4.0, -2.0)),
    ),
)
RIGHT = Answer((3, 1, 4), "stop", {0: {3: 8.0, 7: 7.99, 0: -10.0}, 2: {4: 5.0, 0: 4.0, 7: -2.0}})


def test_a_right_answer_passes() -> None:
    found = compare(CASE, RIGHT, TOLERANCE)
    assert (found.equal, found.near_tie, found.steps, found.worst, found.problems) == (3, None, 2, 0.0, ())


def test_logits_are_found_in_an_array() -> None:
    logits = np.zeros(8, np.float32)
    logits[[4, 0, 7]] = 5.0, 4.0, -2.004  # 0.0008 of 5
    found = compare(CASE, replace(RIGHT, logits={2: logits}), TOLERANCE)
    assert found.problems == ()
    assert found.steps == 1
    assert abs(found.worst - 0.0008) < 1e-6


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens": (3, 2, 4)}, "token 1 is 2, not 1"),
        ({"tokens": (0, 1, 4)}, "token 0 is 0, not 3"),  # listed, and far from the best
        ({"tokens": (3, 1, 0)}, "token 2 is 0, not 4"),
        ({"tokens": (3, 1)}, "2 tokens were given out, not 3"),
        ({"tokens": (3, 1, 4, 4)}, "4 tokens were given out, not 3"),
        ({"tokens": ()}, "0 tokens were given out, not 3"),
        ({"finish_reason": "length"}, "it ended with 'length', not 'stop'"),
        ({"logits": {2: {4: 5.0, 0: 4.0, 7: -2.01}}}, "logits of step 2 are off by 0.002, over 0.001"),
        ({"logits": {2: {4: 5.0, 0: float("nan"), 7: -2.0}}}, "logits of step 2 are off by nan, over 0.001"),
    ],
)
def test_a_wrong_answer_is_told(changed: dict[str, Any], told: str) -> None:
    assert compare(CASE, replace(RIGHT, **changed), TOLERANCE).problems == (told,)


def test_a_case_ends_at_a_near_tie() -> None:
    """The text behind it is another, and so are its logits and its end."""
    other = Answer((7, 9), "length", {0: RIGHT.logits[0], 2: {4: 0.0, 0: 0.0, 7: 0.0}})
    found = compare(CASE, other, TOLERANCE)
    assert (found.equal, found.near_tie, found.steps, found.problems) == (0, 0, 1, ())


def test_it_survives_json(tmp_path: Path) -> None:
    golden = Golden(precision="int8", target="portable", tolerance=TOLERANCE, cases=(CASE, CASE))
    (tmp_path / GOLDEN).write_text(golden.to_json())
    assert read(tmp_path) == golden
    assert max(map(len, golden.to_json().splitlines())) < 100


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("format_version",), 2, "version 2"),
        (("more",), 1, "more"),
        (("tolerance", "logits"), 0, "tolerance.logits"),
        (("cases", 0, "tokens"), [], "tokens"),
        (("cases", 0, "tokens"), [3, 1, 5], "the best of step 2 is not its token"),
        (("cases", 0, "max_new_tokens"), 2, "3 tokens are more than 2"),
        (("cases", 0, "logits", 0, "ids"), [3, 3, 0], "twice"),
        (("cases", 0, "logits", 0, "values"), [8.0, 9.0, 1.0], "not the best"),
        (("cases", 0, "logits", 0, "values"), [8.0, None, 1.0], "values"),
    ],
)
def test_a_wrong_file_is_refused(
    path: tuple[Any, ...], value: Any, word: str, tmp_path: Path, refused: Callable[..., Any]
) -> None:
    raw = json.loads(
        Golden(precision="fp32", target="portable", tolerance=TOLERANCE, cases=(CASE,)).to_json()
    )
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / GOLDEN).write_text(json.dumps(raw))
    with refused("read golden", word):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"), [(None, "has no golden.json"), ("{", "not JSON"), ("[1]", "version")]
)
def test_no_file_is_refused(
    content: str | None, word: str, tmp_path: Path, refused: Callable[..., Any]
) -> None:
    if content is not None:
        (tmp_path / GOLDEN).write_text(content)
    with refused("read golden", word):
        read(tmp_path)
