"""Texts to calibrate with: a model's own, made by sampling, so that nothing has to be brought along."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.streaming import streamed

ROWS = 1 << 11  # of the head in fp32 at once: as many as a cache holds


@torch.no_grad()
def own_texts(checkpoint: Checkpoint, texts: int, length: int, say: Say, seed: int = 0) -> Tensor:
    """Ids [texts, length] as the model itself writes them, each token drawn by its probability."""
    model, family = checkpoint.runnable(), checkpoint.family
    decoder = family.decoder(model)
    head = checkpoint.head()
    generator = torch.Generator().manual_seed(seed)
    widened = torch.empty(min(ROWS, len(head)), head.shape[1])
    ids = torch.full((texts, 1), first_token(decoder.config))
    cache = DynamicCache()
    with streamed(checkpoint, model, again=True) as embedded:
        for step in range(1, length):
            if step % 16 == 1:
                say(f"sampling {texts} texts to calibrate with, token {step} of {length}")
            run = decoder(input_ids=embedded(ids[:, -1:]), past_key_values=cache, use_cache=True)
            hidden = run.last_hidden_state[:, -1]
            odds = family.logits(decoder.config, _scores(hidden, head, widened)).softmax(-1)
            ids = torch.cat([ids, drawn(odds, generator)], dim=1)
    return ids


def _scores(hidden: Tensor, head: Tensor, widened: Tensor) -> Tensor:
    """Of hidden [B, H] and a head [V, H] of any float dtype: [B, V]. widened: fp32 [rows, H], to work in."""
    parts = torch.split(head, len(widened))
    return torch.cat([functional.linear(hidden, widened[: len(part)].copy_(part)) for part in parts], dim=-1)


def drawn(odds: Tensor, generator: torch.Generator) -> Tensor:
    """A token [B, 1] by odds [B, V]: one random number each, where `multinomial` takes one for each entry."""
    sums = odds.cumsum(-1, dtype=torch.float64)
    sought = torch.rand(len(odds), 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
    return torch.searchsorted(sums, sought, right=True).clamp_(max=odds.shape[1] - 1)


def first_token(config: object) -> int:
    """What a text of a model begins with: `bos_token_id`, without one `eos_token_id`, without that 0."""
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) else found
        if found is not None:
            return int(found)
    return 0
