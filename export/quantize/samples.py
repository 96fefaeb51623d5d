"""Texts to calibrate with: a model's own, made by sampling, so that nothing has to be brought along."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.streaming import streamed

ROWS = 1 << 11  # of the head in fp32 at once: as many as a cache holds
TOGETHER = 8  # texts whose odds are in memory at once


@torch.no_grad()
def own_texts(checkpoint: Checkpoint, texts: int, length: int, say: Say, seed: int = 0) -> Tensor:
    """Ids [texts, length] as the model itself writes them, each token drawn by its probability.

    What a step needs in memory is there from the start: fresh memory for each token took a third of the time
    with a vocabulary of 262144.
    """
    model, family = checkpoint.runnable(), checkpoint.family
    decoder = family.decoder(model)
    head = checkpoint.head()
    generator = torch.Generator().manual_seed(seed)
    widened = torch.empty(min(ROWS, len(head)), head.shape[1])
    scores, sums = torch.empty(texts, len(head)), torch.empty(TOGETHER, len(head), dtype=torch.float64)
    ids = torch.full((texts, length), first_token(decoder.config))
    cache = Cache(layer_class_to_replicate=partial(_Allocated, length))
    with streamed(checkpoint, model, again=True) as embedded:
        for step in range(1, length):
            if step % 16 == 1:
                say(f"sampling {texts} texts to calibrate with, token {step} of {length}")
            run = decoder(input_ids=embedded(ids[:, step - 1 : step]), past_key_values=cache, use_cache=True)
            _score(run.last_hidden_state[:, -1], head, widened, scores)
            sought = torch.rand(texts, 1, generator=generator, dtype=torch.float64)
            for start in range(0, texts, TOGETHER):
                some = slice(start, start + TOGETHER)
                odds = functional.softmax(family.logits(decoder.config, scores[some]), -1)
                ids[some, step : step + 1] = drawn(odds, sought[some], sums)
    return ids


class _Allocated(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values in memory for `length` tokens: one that grows is copied for each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = [
            states.new_empty(*states.shape[:2], self._length, states.shape[3])
            for states in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        self.keys, self.values = (room[:, :, :stop] for room in self._rooms)
        return self.keys, self.values


def _score(hidden: Tensor, head: Tensor, widened: Tensor, scores: Tensor) -> None:
    """Hidden [B, H] times a head [V, H] of any float dtype, as scores [B, V]. widened: fp32, to work in."""
    for start in range(0, len(head), len(widened)):
        part = head[start : start + len(widened)]
        scores[:, start : start + len(part)] = functional.linear(hidden, widened[: len(part)].copy_(part))


def drawn(odds: Tensor, at: Tensor, sums: Tensor) -> Tensor:
    """Tokens [B, 1] by odds [B, V] and float64 numbers [B, 1] from 0 to 1: where the sum of odds is that.

    One number each, where `multinomial` takes one for each entry. sums: float64 [B or more, V], to work in.
    """
    sums = sums[: len(odds)].copy_(odds).cumsum_(-1)
    return torch.searchsorted(sums, at * sums[:, -1:], right=True).clamp_(max=odds.shape[1] - 1)


def first_token(config: object) -> int:
    """What a text of a model begins with: `bos_token_id`, without one `eos_token_id`, without that 0."""
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) else found
        if found is not None:
            return int(found)
    return 0
