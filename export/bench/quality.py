"""What each contender's distributions lose against PyTorch's in fp32 over a text: its own logits, as it runs.

The statistics are those of `stillgraph validate`: half of each chunk is a prompt, the rest is given token by
token. Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillgraph.exporter.bench.contender import Contender, ContenderSource, others
from stillgraph.exporter.bench.interleave import Entry
from stillgraph.exporter.bench.lineup import Subject
from stillgraph.exporter.bench.process import TurnFailed, launch
from stillgraph.exporter.bench.worker import Request
from stillgraph.exporter.checkpoint_folder import SHIPPED
from stillgraph.exporter.texts.passages import default_texts, read_texts
from stillgraph.exporter.validate.cases import Depth
from stillgraph.exporter.validate.chunks import EXTENTS, Chunks, cut
from stillgraph.exporter.validate.divergences import Statistics, summarize
from stillgraph.exporter.validate.metrics import diverge

REFERENCE = "torch"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scoring:
    """What contenders are asked for logits over, and whose they are compared with; work: room for files."""

    texts: Sequence[Chunks]
    reference: Contender
    work: Path

    def told(self) -> str:
        """What is measured over, in a sentence."""
        parts = [f"{len(text.ids)} of {text.ids.shape[1]} tokens of {text.name}" for text in self.texts]
        return f"KL divergence from PyTorch fp32 over the second halves of chunks: {', '.join(parts)}."

    def score(self, entries: Sequence[Entry], say: Say) -> None:
        """Fill in the quality of each contender that has run, once for all settings, or why it has none."""
        rows = [[int(token) for token in ids] for text in self.texts for ids in text.ids]
        following = [token for ids in rows for token in ids[len(ids) // 2 + 1 :]]
        done: dict[str, Statistics | str] = {}
        self.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.work, prefix="logits-") as name:
            reference = Entry(self.reference, entries[0].setting)
            truth = logits_of(reference, rows, Path(name) / "reference", say)
            for entry in entries:
                if entry.note is not None:
                    continue
                if entry.contender.name not in done:
                    found = logits_of(entry, rows, Path(name) / "found", say)
                    done[entry.contender.name] = compare(truth, found, following)
                entry.quality = done[entry.contender.name]


def scoring_of(
    subject: Subject, source: ContenderSource, given: Sequence[Path], depth: Depth
) -> Scoring | None:
    """The texts that `stillgraph validate` measures over at this depth; None without a tokenizer.

    Raises StillgraphError for a text that cannot be read.
    """
    folder = SHIPPED.get(source.checkpoint, Path(source.checkpoint))
    extent = EXTENTS[depth]
    texts = read_texts(given) or default_texts(folder)[: extent.texts]
    found = [chunks for chunks in cut(subject.bundle, subject.manifest, texts, extent) if chunks.name]
    eager = next((one for one in others(source) if one.name == REFERENCE), None)
    return Scoring(found, eager, source.work) if found and eager else None


def compare(truth: np.ndarray | str, found: np.ndarray | str, following: Sequence[int]) -> Statistics | str:
    """Of logits [n, V] each, and the n tokens that follow in the text; words where there are none."""
    if isinstance(truth, str):
        return f"no quality, for PyTorch: {truth}"
    if isinstance(found, str):
        return f"no quality: {found}"
    if found.shape != truth.shape:
        return f"no quality: {found.shape[1]} logits a token where PyTorch has {truth.shape[1]}"
    if not np.isfinite(found).all():
        return "no quality: its logits are not finite"
    return summarize([diverge(*of) for of in zip(truth, found, following, strict=True)])


def logits_of(entry: Entry, rows: list[list[int]], path: Path, say: Say) -> np.ndarray | str:
    """A contender's logits, float32 [n, V], mapped from the file that its process wrote; or why none."""
    contender, setting = entry.contender, entry.setting
    count = sum((len(ids) - 1) // 2 for ids in rows)
    say(f"logits over {count} tokens of text: {contender.label}")
    request = Request(
        contender.model, [], 0, setting.threads, setting.ctx, contender.options, logits=str(path), texts=rows
    )
    try:
        _, row, _ = launch(contender, request)
    except TurnFailed as error:
        return str(error)
    if row["rows"] != count:
        return f"it gave logits of {row['rows']} of {count} tokens" if row["rows"] else "it gives no logits"
    return np.memmap(path, np.float32, "r").reshape(count, -1)
