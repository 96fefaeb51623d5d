"""A validation's picture: its pixels, and a text with it in the middle.

Shapes: B rows, N tokens, S tokens of a call, T features of a picture, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stillgraph.exporter.ort import open_graph
from stillgraph.manifest import Manifest
from stillgraph.spec import VisionSpec

BEFORE = 4  # tokens before the picture
NUMBER = 1  # of the picture, among those of a call


def pixels(vision: VisionSpec, seed: int = 0) -> np.ndarray:
    """Noise [1, 3, H, W] of the size that normalized pixels have."""
    size = 1, vision.channels, vision.height, vision.width
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def without_pictures(ids: np.ndarray, vision: VisionSpec | None) -> np.ndarray:
    """Ids without the one that stands for a picture."""
    return ids if vision is None else np.where(ids == vision.image_token, vision.image_token - 1, ids)


def with_picture(ids: np.ndarray, vision: VisionSpec) -> np.ndarray:
    """Ids [B, N] with a picture's image tokens behind the first of them, N in all."""
    image = np.full((len(ids), vision.image_tokens), vision.image_token, np.int64)
    return np.concatenate([ids[:, :BEFORE], image, ids[:, BEFORE:]], 1)[:, : ids.shape[1]]


def end(vision: VisionSpec) -> int:
    """Tokens up to the picture's last."""
    return BEFORE + vision.image_tokens


def fill(embeddings: np.ndarray, first: int, features: np.ndarray) -> np.ndarray:
    """Put the picture's features [T, hidden] into embeddings [S, hidden] of the positions from `first` on.

    Returns the number of each token's picture, int64 [S], 0 for text.
    """
    positions = first + np.arange(len(embeddings)) - BEFORE
    inside = (positions >= 0) & (positions < len(features))
    embeddings[inside] = features[positions[inside]]
    return np.where(inside, NUMBER, 0)


def uncut(first: int, count: int, vision: VisionSpec) -> int:
    """How many of `count` tokens from position `first` on a call takes that must not cut the picture."""
    stop = first + count
    return BEFORE - first if vision.bidirectional and first < BEFORE < stop < end(vision) else count


def features(bundle: Path, manifest: Manifest, optimized: bool) -> np.ndarray:
    """What a bundle's vision graph makes of the picture: [T, hidden]."""
    graph, vision = manifest.graph("vision"), manifest.model.vision
    assert graph is not None
    assert vision is not None
    session = open_graph(bundle / graph.file.path, optimized, optimized and manifest.quantization is not None)
    (found,) = session.run(None, {graph.input("pixels").name: pixels(vision)})
    result: np.ndarray = found[0]
    return result
