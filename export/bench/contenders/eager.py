"""PyTorch eager with transformers' growing cache, as one contender: what a bundle is measured against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers.image_utils import load_image

from stillgraph.exporter.checkpoint import open_checkpoint

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
        self.swap_seconds = self.vision_seconds = 0.0
        self.image, self.folder = request.image, checkpoint.folder
        vision = checkpoint.spec.vision
        self.sees_both_ways = vision is not None and vision.bidirectional
        decoder = [*checkpoint.family.decoder(model).parameters(), model.lm_head.weight]
        weights = sum(parameter.nbytes for parameter in set(decoder)) / MB
        tied = self.model.config.tie_word_embeddings
        table = self.model.get_input_embeddings().weight.nbytes / MB
        self.facts = {
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "weights_mb": weights,
            "read_mb": weights if tied else weights - table,
        }

    @torch.inference_mode()
    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        cache, fed, seen = None, torch.tensor([ids]), self.seen(ids) if self.image else {}
        for _ in range(count):
            output = self.model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1, **seen)
            cache, fed, seen = output.past_key_values, output.logits[:, -1:].argmax(-1), {}
            yield int(fed)

    @torch.inference_mode()
    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        cache, start = None, 0
        for end in range(first + 1, len(ids) + 1):
            fed = torch.tensor([ids[start:end]])
            output = self.model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, start = output.past_key_values, end
            yield output.logits[0, -1].float().numpy()

    def seen(self, ids: list[int]) -> dict[str, Any]:
        """The picture, read and preprocessed by transformers, as the features that the model takes."""
        processor = transformers.AutoImageProcessor.from_pretrained(self.folder, backend="pil")
        pixels = processor(images=load_image(self.image), return_tensors="pt")["pixel_values"]
        began = time.perf_counter()
        found = self.model.get_image_features(pixel_values=pixels.to(self.model.dtype))
        self.vision_seconds += time.perf_counter() - began
        marks = torch.tensor([ids]) == self.model.config.image_token_id
        types = {"token_type_ids": marks.long()} if self.sees_both_ways else {}
        return {"mm_encoder_outputs": {"image": found}, **types}


def open_contender(request: Any) -> Eager:
    return Eager(request)
