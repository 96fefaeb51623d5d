"""The embed graph before a prefill that takes embeddings: ids to rows, and pictures into theirs.

Shapes: B rows, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stillgraph.chunking import numbered
from stillgraph.manifest import GraphEntry
from stillgraph.session import Array, Runner, empty

Fill = Callable[[Sequence[int], Array], None]


class Embedder:
    """Writes embeddings [B, P, hidden] where the prefill reads them.

    fill(input_ids, rows): puts into the rows of ids below zero what is not a token's embedding; image_tokens:
    of each picture; pad: the id that stands where there is no token.
    """

    def __init__(
        self,
        entry: GraphEntry,
        load: Callable[[GraphEntry], Runner],
        fill: Fill,
        image_tokens: int,
        pad: int = 0,
    ) -> None:
        self.entry, self._load, self._fill, self.image_tokens = entry, load, fill, image_tokens
        self._pad = pad
        self._ids = empty(entry.input("token_ids"))  # [B, P]
        self._call: Callable[[], None] | None = None

    def load(self, embeddings: Array, pictures: Array | None) -> None:
        """The prefill's own inputs, which every run writes; pictures: their numbers, where it asks."""
        self._embeddings, self._pictures = embeddings, pictures
        ids, output = self.entry.input("token_ids"), self.entry.output("embeddings")
        arrays = {ids.name: self._ids, output.name: embeddings}
        self._call = self._load(self.entry).bind(arrays)

    def unload(self) -> None:
        self._call = None

    def run(self, pieces: Sequence[Sequence[int]]) -> None:
        """The embeddings of a piece a row; those behind its end are of the pad token."""
        assert self._call is not None
        self._ids[:] = self._pad
        for row, piece in enumerate(pieces):
            self._ids[row, : len(piece)] = [max(input_id, 0) for input_id in piece]
        self._call()
        for piece, rows in zip(pieces, self._embeddings, strict=True):
            self._fill(piece, rows)
        if self._pictures is not None:
            self._pictures[:] = 0
            for row, piece in enumerate(pieces):
                self._pictures[row, : len(piece)] = numbered(piece, self.image_tokens)
