"""PyTorch eager with transformers' growing cache, as one contender: what a bundle is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

from export.checkpoint import open_checkpoint

MB = 1e6


class Eager:
    def __init__(self, request: Any) -> None:
        torch.set_num_threads(request.threads)
        checkpoint = open_checkpoint(request.model)
        if checkpoint.sha256 != request.options["sha256"]:
            raise SystemExit(f"{request.model} is not the checkpoint that the bundle was made from")
        dtype = getattr(torch, request.options["dtype"])
        model: Any = checkpoint.load()
        self.model = model.to(dtype).eval()
        self.swap_seconds = 0.0
        weights = sum(parameter.nbytes for parameter in self.model.parameters()) / MB
        tied = self.model.config.tie_word_embeddings
        table = self.model.get_input_embeddings().weight.nbytes / MB
        self.facts = {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "weights_mb": weights,
            "read_mb": weights if tied else weights - table,
        }

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        cache, fed = None, torch.tensor([ids])
        for _ in range(count):
            output = self.model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
            yield int(fed)


def open_contender(request: Any) -> Eager:
    return Eager(request)
