"""Which prompts a validation runs, over which ids, in which settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from stillgraph.errors import StillgraphError
from stillgraph.exporter.texts.passages import Text
from stillgraph.exporter.validate import image
from stillgraph.manifest import GraphEntry, Manifest
from stillgraph.spec import ModelSpec

if TYPE_CHECKING:  # it brings torch, and the bench takes chunks of texts without it
    from stillgraph.exporter.validate.report import TextKind

STEPS = 3  # decode steps after each prompt
WRITTEN_BYTES = 3_000_000_000  # of weights that are evaluated as written: they are in memory twice
ROW_STAGGER = 5  # rows of a batch differ by this many prompt tokens
Depth = Literal["quick", "default", "full"]


class Subject(Protocol):
    """What is proven: a bundle by its manifest, or a graph of another exporter."""

    @property
    def model(self) -> ModelSpec: ...

    @property
    def graphs(self) -> dict[str, GraphEntry]: ...

    def graph(self, role: str) -> GraphEntry | None: ...


@dataclass(frozen=True)
class ValidationPlan:
    """Cases over one text: prompts followed by a few steps each, and prompts walked to the end of ctx.

    as_written: ops are evaluated by onnx, in the numbers that they name, and not by ONNX Runtime.
    """

    text: TextKind
    optimized: bool
    prompts: tuple[int, ...]
    walks: tuple[int, ...]
    as_written: bool = False


def make_plans(manifest: Subject, depth: Depth) -> list[ValidationPlan]:
    """Which prompts are run in which setting."""
    prompts = tuple(edges(manifest))
    walk = (min(limit(manifest) - 1, max_len(manifest) or 1),) if manifest.graph("decode") else ()
    seen = pictured(manifest)
    if depth == "quick":
        quick = [plan for plan in seen if plan.optimized]
        return [ValidationPlan("random", True, prompts, ()), *quick]
    everywhere = walk if depth == "full" else ()
    return [
        ValidationPlan("random", False, prompts, everywhere),
        ValidationPlan("random", True, prompts, walk),
        ValidationPlan("text", False, prompts, everywhere)
        if depth == "full"
        else ValidationPlan("text", False, prompts[:1], ()),
        ValidationPlan("text", True, prompts, everywhere),
        *seen,
    ]


def written(manifest: Manifest) -> list[ValidationPlan]:
    """A short prompt and a long one through fp16 graphs as they are written.

    ONNX Runtime on a CPU computes them in fp32, where nothing overflows. None of weights that are too many to
    be in memory twice.
    """
    if manifest.precision != "fp16" or manifest.weights.file.nbytes > WRITTEN_BYTES:
        return []
    longest = min(max_len(manifest) or 1, limit(manifest) - 1)
    return [ValidationPlan("random", False, tuple(sorted({1, max(1, longest)})), (), as_written=True)]


def pictured(manifest: Subject) -> list[ValidationPlan]:
    """A text with a picture, cut behind it and, where there is room, at the edges; none without its graph."""
    vision = manifest.model.vision
    if vision is None or manifest.graph("vision") is None or manifest.graph("prefill") is None:
        return []
    first = image.end(vision) + 1
    if vision.bidirectional:  # then no row may end in the picture
        first += (rows(manifest) - 1) * ROW_STAGGER
    if first >= limit(manifest) or (first > (max_len(manifest) or 0) and not continues(manifest)):
        return []
    prompts = tuple(sorted({first, *(prompt for prompt in edges(manifest) if prompt > first)}))
    return [ValidationPlan("picture", optimized, prompts, ()) for optimized in (False, True)]


def edges(manifest: Subject) -> Iterator[int]:
    """Prompt lengths where a static graph goes wrong first: around P, 2P, each window, and the end of ctx."""
    chunk, end = max_len(manifest), limit(manifest)
    near = {1, 2, end - 1, *(window + delta for window in manifest.model.windows for delta in (-1, 0, 1))}
    if chunk is not None:
        near |= {chunk - 1, chunk, chunk + 1, 2 * chunk + 1}
    only_prefill = manifest.graph("decode") is None
    last = chunk if only_prefill and chunk is not None and not continues(manifest) else end - 1
    yield from sorted(length for length in near if 1 <= length <= last)


def max_len(manifest: Subject) -> int | None:
    """Tokens that the prefill takes at once, or None where there is none."""
    graph = manifest.graph("prefill")
    return graph.shape.max_len if graph else None


def continues(manifest: Subject) -> bool:
    graph = manifest.graph("prefill")
    return graph is not None and graph.shape.ctx is not None


def limit(manifest: Subject) -> int:
    """The longest text the bundle can hold: ctx, or P of a prefill alone that continues nothing."""
    return max(graph.shape.limit for graph in manifest.graphs.values() if graph.shape.caches)


def rows(manifest: Subject) -> int:
    """Rows of every graph of the bundle."""
    return next(graph.shape.batch for graph in manifest.graphs.values() if graph.shape.caches)


def positions(manifest: Subject, plan: ValidationPlan) -> set[int]:
    """Positions whose logits a plan compares, for every row."""
    found: set[int] = set()
    end = limit(manifest)
    for row in range(rows(manifest)):
        for prompt in plan.prompts:
            first = max(1, prompt - row * ROW_STAGGER) - 1
            found |= set(range(first, min(first + STEPS + 1, end)))
        for prompt in plan.walks:
            found |= set(range(max(1, prompt - row * ROW_STAGGER) - 1, end))
    return found


def random_ids(manifest: Subject) -> np.ndarray:
    """Seeded ids over the whole vocabulary, int64 [B, limit]; every row its own."""
    shape = rows(manifest), limit(manifest)
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, shape)
    return image.without_pictures(ids, manifest.model.vision)


def text_ids(bundle: Path, manifest: Subject, texts: Sequence[Text]) -> np.ndarray:
    """Texts through the bundle's own tokenizer, int64 [B, limit]; every row starts at another place.

    They begin again where they are too short. Raises StillgraphError for a bundle without tokenizer.
    """
    path, length, count = bundle / "tokenizer.json", limit(manifest), rows(manifest)
    if not path.is_file():
        raise StillgraphError(
            "validate", f"{path} is missing", "export the bundle again from a checkpoint with one"
        )
    tokenizer = Tokenizer.from_file(str(path))
    ids = np.resize(np.concatenate([text.ids(tokenizer) for text in texts]), length + count)
    return np.stack([ids[row : row + length] for row in range(count)])
