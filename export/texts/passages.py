"""Texts to measure a model over, and their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint_folder import SHIPPED
from stillgraph.exporter.demo.stories import held_out

STAGE = "read text"
LEAST = 1000  # characters: some hundred tokens, so that a mean says something
STORIES = 32
SHIPPED_TEXTS = tuple(Path(__file__).parent / name for name in ("prose.txt", "code.txt"))


@dataclass(frozen=True)
class Text:
    """Passages that are tokenized one by one; special tokens begin each. name: of its file."""

    name: str
    passages: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(self.passages).encode()).hexdigest()

    def ids(self, tokenizer: Tokenizer) -> np.ndarray:
        """All tokens, int64 [N]."""
        found = [tokenizer.encode(passage).ids for passage in self.passages]
        return np.concatenate([np.array(ids, np.int64) for ids in found])


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """A user's texts. Raises StillgraphError for one that is missing, binary or too short to measure over."""
    return [_read(path) for path in dict.fromkeys(paths)]


def cut_chunks(ids: np.ndarray, length: int, count: int, bos: int | None) -> np.ndarray:
    """The first `count` chunks of `length` of a text's ids [N]: int64 [n, length]; all of a shorter text.

    bos: the token that each begins with in place of its own, as in llama.cpp, where the tokenizer puts one.
    """
    size = min(length, len(ids))
    found = np.resize(ids, (min(count, len(ids) // size), size)).astype(np.int64)
    if bos is not None:
        found[:, 0] = bos
    return found


def _read(path: Path) -> Text:
    remedy = "name a file of plain text in UTF-8"
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path} is not text in UTF-8 (byte {error.start})"
        raise StillgraphError(STAGE, problem, remedy) from error
    except OSError as error:
        raise StillgraphError(STAGE, f"{path}: {error.strerror}", remedy) from error
    if "\0" in content:
        raise StillgraphError(STAGE, f"{path} has a zero byte, as no text has", remedy)
    if (count := len(content.strip())) < LEAST:
        problem = f"{path} has {count} characters, of which no statistics can be made"
        raise StillgraphError(STAGE, problem, f"name a text of {LEAST} or more")
    return Text(path.name, (content,))


def default_texts(checkpoint: Path) -> list[Text]:
    """What ships for the checkpoint in this folder: a demo's held-out stories, for others prose and code."""
    if checkpoint in SHIPPED.values():
        stories = tuple(story.text for story in islice(held_out(seed=0), STORIES))
        return [Text("held-out stories", stories)]
    return [Text(path.name, (path.read_text(encoding="utf-8"),)) for path in SHIPPED_TEXTS]
