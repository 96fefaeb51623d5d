"""The one error type, between processes."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.manifest import read


@pytest.mark.parametrize("kind", [StillgraphError, CheckFailed])
def test_an_error_is_the_same_after_pickling(kind) -> None:
    error = kind("load bundle", "it is not there", "make one")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), vars(copy)) == (str(error), vars(error))
    assert copy.args == error.args


def test_a_value_of_any_length_makes_a_sentence_of_some() -> None:
    error = StillgraphError("load bundle", "a" * 2500 + "b" * 2500, "make one")
    assert str(error) == f"load bundle: {'a' * 500}...{'b' * 500}; make one."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_error_comes_out_of_a_worker_process(tmp_path) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(StillgraphError, match=r"has no manifest\.json"),
    ):
        pool.submit(read, tmp_path).result(timeout=60)
