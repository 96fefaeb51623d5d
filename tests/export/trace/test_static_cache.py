"""The rule of what a position sees and where a token is written, as small literal matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import (
    create_masks_for_vision_model,
    get_block_sequence_ids_for_mask,
)

from stillgraph.exporter.trace.static_cache import StaticCache, same_picture, visible, write


def matrix(*rows: str) -> Tensor:
    """A bool matrix drawn with x and ."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_a_window_of_4_and_a_length_of_8() -> None:
    seen = visible(torch.arange(8)[None], keys=8, window=4)
    expected = matrix(
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        ".xxxx...",
        "..xxxx..",
        "...xxxx.",
        "....xxxx",
    )
    assert torch.equal(seen, expected[None])


def test_no_window_sees_everything_before() -> None:
    seen = visible(torch.arange(4)[None], keys=6, window=None)
    assert torch.equal(seen, matrix("x.....", "xx....", "xxx...", "xxxx..")[None])


def test_decode_rows_at_positions_of_their_own() -> None:
    positions = torch.tensor([[0], [3], [4], [7]])
    sliding, full = (visible(positions, keys=8, window=window) for window in (4, None))
    assert torch.equal(sliding[:, 0], matrix("x.......", "xxxx....", ".xxxx...", "....xxxx"))
    assert torch.equal(full[:, 0], matrix("x.......", "xxxx....", "xxxxx...", "xxxxxxxx"))


def test_a_prefill_that_continues_a_cache() -> None:
    """3 tokens after a past of 4 and of 1, over 8 slots, with a window of 3."""
    positions = torch.arange(3)[None] + torch.tensor([4, 1])[:, None]
    seen = visible(positions, keys=8, window=3)
    assert torch.equal(seen[0], matrix("..xxx...", "...xxx..", "....xxx."))
    assert torch.equal(seen[1], matrix("xx......", "xxx.....", ".xxx...."))


def test_tokens_of_one_picture_see_each_other() -> None:
    """7 tokens behind a past of 1: text, a picture of 3, a picture of 2, text; with a window of 3."""
    positions, pictures = torch.arange(1, 8)[None], torch.tensor([[0, 1, 1, 1, 2, 2, 0]])
    same = same_picture(pictures, torch.arange(9)[None] - 1)
    assert torch.equal(
        visible(positions, 9, None, same)[0],
        matrix(
            "xx.......",
            "xxxxx....",
            "xxxxx....",
            "xxxxx....",
            "xxxxxxx..",
            "xxxxxxx..",
            "xxxxxxxx.",
        ),
    )
    assert torch.equal(
        visible(positions, 9, 3, same)[0],
        matrix(
            "xx.......",
            "xxxxx....",
            ".xxxx....",
            "..xxx....",
            "...xxxx..",
            "....xxx..",
            ".....xxx.",
        ),
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=4), st.integers(1, 9))
def test_masks_of_pictures_are_those_of_transformers(parts: list[tuple[int, int]], window: int) -> None:
    """Texts and pictures in turn, a token of text between any two."""
    config = Gemma3TextConfig(sliding_window=window, num_hidden_layers=2, attn_implementation="eager")
    numbers = [0]
    for number, (text, image) in enumerate(parts, 1):
        numbers += [0] * text + [number] * image + [0]
    pictures, total = torch.tensor([numbers]), len(numbers)
    expected = create_masks_for_vision_model(
        config,
        torch.zeros(1, total, 8),
        None,
        None,
        torch.arange(total)[None],
        get_block_sequence_ids_for_mask((pictures > 0).long()),
    )
    same = same_picture(pictures, torch.arange(total)[None])
    for kind, size in (("full_attention", None), ("sliding_attention", window)):
        seen = visible(torch.arange(total)[None], total, size, same)[0]
        assert torch.equal(seen, expected[kind][0, 0] == 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 24), st.integers(0, 24), st.integers(1, 30))
def test_masks_are_those_of_transformers(new: int, past: int, window: int) -> None:
    config = Gemma3TextConfig(sliding_window=window, num_hidden_layers=2, attn_implementation="eager")
    total = past + new
    # One pass over the whole text: its last rows are what `new` tokens after `past` see.
    embeds = torch.zeros(1, total, 8)
    arguments = {
        "config": config,
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(1, total, dtype=torch.bool),
    }
    arguments |= {"past_key_values": None, "position_ids": torch.arange(total)[None]}
    positions = torch.arange(past, total)[None]
    for make, size in ((create_sliding_window_causal_mask, window), (create_causal_mask, None)):
        additive = make(**arguments)  # [1, 1, total, total], 0 where seen
        assert torch.equal(visible(positions, total, size)[0], additive[0, 0, past:] == 0)


# Slots of a past hold 10, 11, ...; new tokens are 1, 2, 3; padding is -9.
PAST, NEW = [10, 11, 12, 13, 14, 15], [1, 2, 3]


@pytest.mark.parametrize(
    ("past_length", "valid", "expected"),
    [
        (0, 3, [1, 2, 3, 13, 14, 15]),
        (2, 3, [10, 11, 1, 2, 3, 15]),
        (3, 3, [10, 11, 12, 1, 2, 3]),
        (5, 1, [10, 11, 12, 13, 14, 1]),  # the padded chunk reaches 2 slots past the last
        (4, 2, [10, 11, 12, 13, 1, 2]),
        (1, 1, [10, 1, 12, 13, 14, 15]),
        (6, 0, PAST),
    ],
)
def test_write_a_padded_chunk(past_length: int, valid: int, expected: list[int]) -> None:
    new = torch.tensor(NEW[:valid] + [-9] * (3 - valid)).reshape(1, 1, 3, 1)
    past = torch.tensor(PAST).reshape(1, 1, 6, 1)
    found = write(past, new, torch.tensor([past_length]), torch.tensor([valid]))
    assert found.flatten().tolist() == expected
    assert past.flatten().tolist() == PAST


@pytest.mark.parametrize("slot", [0, 3, 5])
def test_write_one_token(slot: int) -> None:
    past = torch.tensor(PAST).reshape(1, 1, 6, 1)
    found = write(past, torch.tensor([7]).reshape(1, 1, 1, 1), torch.tensor([slot]), None)
    assert found.flatten().tolist() == [*PAST[:slot], 7, *PAST[slot + 1 :]]


def test_write_rows_of_different_lengths_heads_and_sizes() -> None:
    """Each row by its own lengths; heads and head dimensions stay where they are."""
    past = torch.zeros(3, 2, 4, 2, dtype=torch.int64)
    new = torch.arange(1, 25).reshape(3, 2, 2, 2)  # [B, KV, S, D]
    found = write(past, new, torch.tensor([0, 3, 1]), torch.tensor([2, 1, 2]))
    assert found[0].tolist() == [[[1, 2], [3, 4], [0, 0], [0, 0]], [[5, 6], [7, 8], [0, 0], [0, 0]]]
    assert found[1].tolist() == [[[0, 0], [0, 0], [0, 0], [9, 10]], [[0, 0], [0, 0], [0, 0], [13, 14]]]
    assert found[2].tolist() == [[[0, 0], [17, 18], [19, 20], [0, 0]], [[0, 0], [21, 22], [23, 24], [0, 0]]]


@settings(deadline=None)
@given(st.data())
def test_write_is_assignment_to_a_slice(data: st.DataObject) -> None:
    capacity, tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    valid = data.draw(st.integers(0, min(tokens, capacity)))
    start = data.draw(st.integers(0, capacity - valid))
    past, new = torch.randn(1, 2, capacity, 3), torch.randn(1, 2, tokens, 3)
    expected = past.clone()
    expected[:, :, start : start + valid] = new[:, :, :valid]
    assert torch.equal(write(past, new, torch.tensor([start]), torch.tensor([valid])), expected)


def test_the_cache_keeps_what_it_returns_for_each_layer() -> None:
    past = [(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1)) for _ in range(2)]
    cache = StaticCache(past, torch.tensor([2]))
    ones = torch.ones(1, 1, 1, 1)
    key, value = cache.update(ones, 2 * ones, 1)
    assert (key.flatten().tolist(), value.flatten().tolist()) == ([0, 0, 1, 0], [0, 0, 2, 0])
    assert cache.present[1] == (key, value)
    assert list(cache.present) == [1]
    assert cache.get_seq_length() is cache.past_length


def test_a_cache_without_a_past_returns_the_new_tokens() -> None:
    cache = StaticCache(None)
    key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
    assert cache.update(key, value, 0) == (key, value)
    assert cache.get_seq_length() == 0
