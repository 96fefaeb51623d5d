"""What PyTorch computes: logits, keys and values at every position of a text, from one pass.

A decoder is causal, so the logits after n tokens of a text are the same however the text is cut into prompt
and steps. One pass with a growing cache therefore serves every case of a validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from stillgraph.exporter.validate import image as picture
from stillgraph.spec import VisionSpec

CHUNK = 128  # tokens a step of the reference pass, so that logits of a long text are never all in memory


@dataclass(frozen=True)
class Reference:
    """The reference of one text. Shapes: B rows, N tokens, L layers, KV key/value heads, D head size.

    ids: int64 [B, N]; logits: position to float32 [B, V], for the positions asked for; keys and values: one
    float32 [B, KV, N, D] a layer; features: of the picture in the text, float32 [T, hidden].
    """

    ids: np.ndarray
    logits: dict[int, np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    features: np.ndarray | None = None


@torch.no_grad()
def reference(
    model: Any, ids: np.ndarray, positions: set[int], vision: VisionSpec | None = None
) -> Reference:
    """Run the original model over `ids` [B, N]; keep the logits at `positions`.

    vision: of a text with the picture of image.py in it, which is given whole with the first chunk.
    """
    # Without a config every layer keeps all keys; the sliding layers still see only their window, by mask.
    cache = DynamicCache()
    logits: dict[int, np.ndarray] = {}
    whole = picture.end(vision) if vision else 0
    image = torch.from_numpy(picture.pixels(vision)) if vision else None
    for start, stop in pairwise([0, *range(whole or CHUNK, ids.shape[1], CHUNK), ids.shape[1]]):
        chunk = torch.from_numpy(ids[:, start:stop])
        given = {}
        if vision is not None and image is not None and not start:
            given["pixel_values"] = image.expand(len(ids), -1, -1, -1)
            if vision.bidirectional:
                given["token_type_ids"] = (chunk == vision.image_token).long()
        wanted = sorted(positions & set(range(start, start + chunk.shape[1])))
        kept = torch.tensor(wanted or [start]) - start  # the head is most of a small model's work
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": kept}
        output = model(input_ids=chunk, **given, **options).logits
        for index, position in enumerate(wanted):
            logits[position] = output[:, index].float().numpy().copy()
    keys = [layer.keys.numpy() for layer in cache.layers]
    values = [layer.values.numpy() for layer in cache.layers]
    features = model.get_image_features(pixel_values=image).pooler_output[0].numpy() if vision else None
    return Reference(ids, logits, keys, values, features)
