"""What PyTorch computes: logits, keys and values at every position of a text, from one pass.

A decoder is causal, so the logits after n tokens of a text are the same however the text is cut into prompt
and steps. One pass with a growing cache therefore serves every case of a validation. A second one in float64
says how much of a difference is PyTorch's own, which depends on weights, depth and position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from stillgraph.exporter.validate import image as picture
from stillgraph.exporter.validate.double import in_double
from stillgraph.exporter.validate.metrics import Magnitudes
from stillgraph.spec import VisionSpec

VECTORS = (1, 3)  # the axes of a slot's keys in [B, KV, N, D]
CHUNK = 128  # tokens a step of the reference pass, so that logits of a long text are never all in memory


@dataclass(frozen=True)
class OwnError:
    """How far PyTorch in fp32 is from float64: of each position's logits [B], of each slot of a layer [B, N],
    of each feature of the picture [T].

    whole: of all of it, relative: RMS, worst, and RMS of the vector that has most; by what it is and its
    layer, if it has one.
    """

    whole: dict[tuple[str, int | None], tuple[float, float, float]]
    logits: dict[int, Magnitudes]
    keys: list[Magnitudes]
    values: list[Magnitudes]
    features: Magnitudes | None


@dataclass(frozen=True)
class Reference:
    """The reference of one text. Shapes: B rows, N tokens, L layers, KV key/value heads, D head size.

    ids: int64 [B, N]; logits: position to float32 [B, V], for the positions asked for; keys and values: one
    float32 [B, KV, N, D] a layer; features: of the picture in the text, float32 [T, hidden]; own: PyTorch's
    error where these are of float64, rounded once to fp32 at the end.
    """

    ids: np.ndarray
    logits: dict[int, np.ndarray]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    features: np.ndarray | None = None
    own: OwnError | None = None


@torch.no_grad()
def reference(
    model: Any,
    ids: np.ndarray,
    positions: set[int],
    vision: VisionSpec | None = None,
    spool: Path | None = None,
) -> Reference:
    """Run the original model over `ids` [B, N]; keep the logits at `positions`.

    vision: of a text with the picture of image.py in it, which is given whole with the first chunk. spool:
    a new file that holds the logits, where those of many positions would fill the memory.
    """
    logits: dict[int, np.ndarray] = {}

    def keep(position: int, found: np.ndarray) -> None:
        if spool is not None:
            mode: Literal["r+", "w+"] = "r+" if logits else "w+"
            size = len(positions), *found.shape
            block = np.memmap(spool, np.float32, mode, shape=size)[len(logits)]
            block[:] = found
            found = block
        logits[position] = found

    cache = _run(model, ids, positions, vision, keep)
    keys = [_numpy(layer.keys) for layer in cache.layers]
    values = [_numpy(layer.values) for layer in cache.layers]
    return Reference(ids, logits, keys, values, _features(model, vision))


@torch.no_grad()
def exact_reference(
    model: Any, ids: np.ndarray, positions: set[int], vision: VisionSpec | None = None
) -> Reference:
    """As `reference`, in float64 with the weights of fp32, and how far a pass in fp32 is from that."""
    with in_double(model):
        exact = reference(model, ids, positions, vision)
    logits: dict[int, Magnitudes] = {}

    def measure(position: int, found: np.ndarray) -> None:
        logits[position] = Magnitudes.of(found - exact.logits[position])

    whole: dict[tuple[str, int | None], tuple[float, float, float]] = {}

    def spread(error: Magnitudes, truth: Magnitudes) -> tuple[float, float, float]:
        return *error.over(truth), error.largest_over(truth)

    cache = _run(model, ids, positions, vision, measure)
    errors, scale = list(logits.values()), [Magnitudes.of(block) for block in exact.logits.values()]
    whole["logits", None] = spread(Magnitudes.join(errors), Magnitudes.join(scale))
    blocks: dict[str, list[Magnitudes]] = {"keys": [], "values": []}
    for index, layer in enumerate(cache.layers):
        for what, found in (("keys", layer.keys), ("values", layer.values)):
            truth = getattr(exact, what)[index]
            error = Magnitudes.of(_numpy(found) - truth, VECTORS)
            blocks[what].append(error)
            whole[what, index] = spread(error, Magnitudes.of(truth, VECTORS))
    features = None
    if exact.features is not None:
        features = Magnitudes.of(_features(model, vision) - exact.features)
        whole["features", None] = spread(features, Magnitudes.of(exact.features))
    own = OwnError(whole, logits, blocks["keys"], blocks["values"], features)
    return replace(exact, own=own)


def _run(
    model: Any,
    ids: np.ndarray,
    positions: set[int],
    vision: VisionSpec | None,
    keep: Callable[[int, np.ndarray], None],
) -> DynamicCache:
    """One pass in chunks; `keep` gets a position and its logits, float32 [B, V]."""
    # Without a config every layer keeps all keys; the sliding layers still see only their window, by mask.
    cache = DynamicCache()
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
            keep(position, _numpy(output[:, index]))
    return cache


def _features(model: Any, vision: VisionSpec | None) -> np.ndarray | None:
    """Of the picture, float32 [T, hidden]."""
    if vision is None:
        return None
    image = torch.from_numpy(picture.pixels(vision))
    return _numpy(model.get_image_features(pixel_values=image).pooler_output[0])


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy in float32, out of any mode of PyTorch."""
    found: np.ndarray = tensor.numpy().astype(np.float32)
    return found
