"""The chunks of texts that models are measured over, as llama.cpp cuts them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stillgraph.exporter.texts.passages import Text, cut_chunks
from stillgraph.exporter.validate.cases import Depth, limit, random_ids
from stillgraph.manifest import Manifest

SHORTEST = 3  # tokens: a position in the second half has a next token


@dataclass(frozen=True)
class Extent:
    """How much of the texts is run. chunk: tokens; chunks: of each text; texts: of those that ship, None for
    all."""

    chunk: int = 512  # llama.cpp's default
    chunks: int = 2
    texts: int | None = None


EXTENTS: dict[Depth, Extent] = {
    "quick": Extent(chunk=256, chunks=1, texts=1),
    "default": Extent(),
    "full": Extent(chunks=8),
}


@dataclass(frozen=True)
class Chunks:
    """A text's chunks: int64 [n, C]. name: None of random ids."""

    name: str | None
    sha256: str
    ids: np.ndarray

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, int]]:
        """Ids [B, C] and how many of their rows count: the last chunk is repeated to fill the last batch."""
        for start in range(0, len(self.ids), rows):
            batch = self.ids[start : start + rows]
            filler = np.repeat(batch[-1:], rows - len(batch), axis=0)
            yield np.concatenate([batch, filler]), len(batch)


def cut(bundle: Path, manifest: Manifest, texts: Sequence[Text], extent: Extent) -> list[Chunks]:
    """The chunks of each text, from its beginning; of a text that is shorter than one, all of it.

    A chunk begins with the token that begins a text, where the tokenizer puts one, as in llama.cpp. Without
    a tokenizer they are of random ids, and none where the bundle holds too few tokens.
    """
    length, tokens = min(extent.chunk, limit(manifest)), manifest.calling.tokens
    if length < SHORTEST:
        return []
    path = bundle / "tokenizer.json"
    if not path.is_file():
        ids = random_ids(manifest)[:1, :length]
        return [Chunks(None, hashlib.sha256(ids.tobytes()).hexdigest(), ids)]
    tokenizer, found = Tokenizer.from_file(str(path)), list[Chunks]()
    bos = tokens.bos if tokens.tokenizer_adds_bos else None
    for text in texts:
        ids = cut_chunks(text.ids(tokenizer), length, extent.chunks, bos)
        found.append(Chunks(text.name, text.sha256, ids))
    return found
