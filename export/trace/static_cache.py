"""The static key/value cache: fixed buffers, written by position, and the rule of what a position may see.

Shapes: B batch, S new tokens, C cache slots, KV key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def visible(
    positions: Tensor, keys: int | Tensor, window: int | None, picture: Tensor | None = None
) -> Tensor:
    """Which keys each query position may read: bool [B, S, C].

    A position sees itself and everything before it, and what is of its own picture; in a sliding layer only
    the last `window` positions, itself included, and what is behind it (`sliding_window_causal_mask` and
    `create_masks_for_vision_model` of transformers).

    positions: int64 [B, S], absolute; keys: the positions of the keys, int64 [B, C], or how many they are
    where key j has position j; picture: `same_picture`, where a picture's tokens see each other.
    """
    key = (keys if isinstance(keys, Tensor) else torch.arange(keys)[None])[:, None, :]  # [B, 1, C]
    query = positions[:, :, None]  # [B, S, 1]
    seen = key <= query
    if picture is not None:
        seen = seen | picture
    return seen if window is None else seen & (key > query - window)


def same_picture(pictures: Tensor, source: Tensor) -> Tensor:
    """Which keys are of the same picture as the query: bool [B, S, C].

    pictures: int64 [B, S], numbers of the new tokens' pictures, 0 for text; source: int64 [B, C], which of
    the new tokens a key is, outside 0 to S - 1 where it is none of them: pictures come whole.
    """
    tokens = pictures.shape[1]
    inside = (source >= 0) & (source < tokens)
    source = source.clamp(0, tokens - 1)
    rows = [pictures[row].index_select(0, source[row])[None] for row in range(pictures.shape[0])]
    keys = torch.where(inside, torch.cat(rows), 0)[:, None, :]
    query = pictures[:, :, None]
    return (query == keys) & (query > 0)


def write(past: Tensor, new: Tensor, past_length: Tensor, new_length: Tensor | None) -> Tensor:
    """`past` with the first `new_length` tokens of `new` at slots `past_length` and on: [B, KV, C, D].

    past: [B, KV, C, D]; new: [B, KV, S, D]; past_length, new_length: int64 [B], None where S is 1.
    Padding tokens are never written, so a padded chunk may reach past the last slot. No transpose, and no
    length in a shape. One token is scattered along the slots, which a runtime can do in place; a chunk is
    gathered into its slots and selected over the whole buffer.
    """
    if new_length is None:
        return past.scatter(2, past_length[:, None, None, None].expand_as(new), new)
    capacity, tokens = past.shape[2], new.shape[2]
    # Which of the new tokens each slot would take: [B, C].
    source = torch.arange(capacity)[None, :] - past_length[:, None]
    written = (source >= 0) & (source < new_length[:, None])
    source = source.clamp(0, tokens - 1)
    rows = [new[row, None].index_select(2, source[row]) for row in range(new.shape[0])]
    return torch.where(written[:, None, :, None], torch.cat(rows), past)


class StaticCache:
    """What a model calls `past_key_values`, over buffers of a fixed size. Not a `transformers.Cache`.

    past: (key, value) by layer; one that reads another's keys and values has none, and calls no `update`.
    `present[i]` holds layer i's (key, value) after its `update`: with a past the written buffers
    [B, KV, C, D], without one (the first prompt of a prefill graph) the new tokens themselves [B, KV, S, D].
    """

    def __init__(
        self,
        past: Mapping[int, tuple[Tensor, Tensor]] | None,
        past_length: Tensor | None = None,
        new_length: Tensor | None = None,
    ) -> None:
        self.past, self.past_length, self.new_length = past, past_length, new_length
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store layer `layer_idx`'s new keys and values [B, KV, S, D]; return all it may attend to."""
        if self.past is not None:
            assert self.past_length is not None
            past_key, past_value = self.past[layer_idx]
            key = write(past_key, key, self.past_length, self.new_length)
            value = write(past_value, value, self.past_length, self.new_length)
        self.present[layer_idx] = key, value
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        """Tokens in the cache before this call: int64 [B], or 0 without a past."""
        return 0 if self.past_length is None else self.past_length
