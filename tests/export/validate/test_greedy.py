"""Greedy continuations: PyTorch's own, and the first token at which a graph leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.validate import greedy
from stillgraph.exporter.validate.chunks import Chunks
from stillgraph.exporter.validate.greedy import Continuations, continued, first_differences, passages
from stillgraph.exporter.validate.kinds import FirstDifferences
from stillgraph.manifest import read

Bundle = Callable[..., Path]


def chunks() -> list[Chunks]:
    """Two chunks of 40 tokens, none equal to another."""
    return [Chunks("a", "0", np.arange(6, 86).reshape(2, 40))]


def test_prompts_are_passages_behind_the_first_token_of_a_text(tiny_bundle: Bundle) -> None:
    prompts = passages(read(tiny_bundle(batch=3)), chunks())
    assert prompts.shape[1] == 20  # half of ctx
    assert set(prompts[:, 0]) == {2}  # <bos>
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    assert all(np.array_equal(np.diff(prompt[1:]), np.ones(18)) for prompt in prompts)


def test_a_continuation_is_what_transformers_generates(tiny_bundle: Bundle) -> None:
    manifest = read(tiny_bundle(batch=3))
    model = open_checkpoint(manifest.source.id).load()
    prompts = passages(manifest, chunks())[:2]
    found = continued(model, manifest, prompts)
    given = torch.from_numpy(prompts)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "use_cache": False}
    expected = model.generate(given, attention_mask=torch.ones_like(given), **options)  # type: ignore[operator]
    assert np.array_equal(found.tokens, expected[:, 20:].numpy())


def test_where_a_graph_leaves_a_continuation(tiny_bundle: Bundle, monkeypatch) -> None:
    """The graphs of fp32 follow PyTorch to the end; of a continuation with one other token, up to that."""
    bundle = tiny_bundle(batch=3)
    manifest = read(bundle)
    monkeypatch.setattr(greedy, "PROMPTS", 4)  # a batch of three, and one that is filled up
    truth = continued(open_checkpoint(manifest.source.id).load(), manifest, passages(manifest, chunks()))
    assert first_differences(bundle, manifest, truth).first == (None,) * 4
    tokens = truth.tokens.copy()
    for row, place in ((0, 0), (1, 7), (3, 19)):
        tokens[row, place] = (tokens[row, place] + 1) % 200
    found = first_differences(bundle, manifest, Continuations(truth.prompts, tokens))
    assert found.first == (0, 7, None, 19)


def test_a_median_and_a_histogram_by_hand() -> None:
    found = FirstDifferences(prompt=4, tokens=8, first=(0, 1, 2, 7, None))
    assert (found.equal, found.median) == (1, 2.0)
    assert found.histogram() == [(0, 1, 2), (2, 3, 1), (4, 5, 0), (6, 7, 1)]
    assert FirstDifferences(prompt=4, tokens=8, first=(None, 2, None)).median == 8.0
