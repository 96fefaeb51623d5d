"""Measure each kind of graph in a bundle over texts, and its tokenizer over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from stillgraph.exporter.bundle.tokenizer_files import equal_of_all
from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.checkpoint_folder import DEMO
from stillgraph.exporter.config import Say
from stillgraph.exporter.texts.passages import Text
from stillgraph.exporter.validate.cases import Depth, rows
from stillgraph.exporter.validate.chunks import EXTENTS, Chunks, cut
from stillgraph.exporter.validate.greedy import Continuations, continued, first_differences, passages
from stillgraph.exporter.validate.kinds import Counted, FirstDifferences, Kind, Peak, TokenizerCount
from stillgraph.exporter.validate.quality import TextRun, cost, originals, run_texts
from stillgraph.exporter.validate.recall import recall
from stillgraph.exporter.validate.report import CaseResult, worst_of
from stillgraph.manifest import Manifest, Quality


@dataclass
class Measured:
    """What was measured over texts, by whether the prefill is the one of int8 activations."""

    chunks: list[Chunks] = field(default_factory=list)
    runs: dict[bool, TextRun] = field(default_factory=dict)
    greedy: dict[bool, FirstDifferences] = field(default_factory=dict)
    quality: Quality | None = None

    def kinds(
        self, manifest: Manifest, cases: Sequence[CaseResult], peaks: Sequence[Peak] = ()
    ) -> tuple[Kind, ...]:
        """Each kind, with what the cases and the magnitudes of fp16 say of it."""
        found = list[Kind]()
        for fast in sorted({*self.runs, *(case.int8_activations for case in cases)}):
            own = [case for case in cases if case.int8_activations == fast]
            features = [case.feature_error for case in own if case.feature_error is not None]
            run = self.runs.get(fast)
            kind = Kind(
                precision=manifest.precision,
                int8_prefill=fast,
                worst_error=worst_of([case.worst.relative_error for case in own]),
                feature_error=worst_of(features),
                largest_fp16=worst_of([peak.magnitude for peak in peaks]),
                texts=run.statistics(self.chunks) if run else (),
                layers=run.layers() if run else (),
                greedy=self.greedy.get(fast),
            )
            found.append(kind)
        return tuple(found)


def measure(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, texts: Sequence[Text], depth: Depth, say: Say
) -> Measured:
    """Each kind of a bundle's graphs over texts; nothing of a bundle that lacks a prefill or a decode."""
    found = Measured()
    if manifest.graph("prefill") is None or manifest.graph("decode") is None:
        return found
    found.chunks = cut(bundle, manifest, texts, EXTENTS[depth])
    if not found.chunks:
        return found
    truth: Continuations | None = None
    with TemporaryDirectory(prefix="stillgraph-") as folder:
        say("loading PyTorch's model")
        model = checkpoint.load()
        say(f"PyTorch's pass over {sum(len(text.ids) for text in found.chunks)} chunks of text")
        given = originals(model, found.chunks, rows(manifest), Path(folder))
        if depth == "full":
            say("PyTorch's greedy continuations")
            truth = continued(model, manifest, passages(manifest, found.chunks))
        asked = manifest.quantization and checkpoint.folder == DEMO and depth != "quick"
        recalled = recall(bundle, manifest, model) if asked else None
        del model
        for fast, part in kinds_of(manifest).items():
            say(f"the same text through the graphs{', int8 prefill' if fast else ''}")
            found.runs[fast] = run_texts(bundle, part, given)
            if truth is not None:
                say("greedy continuations through the graphs")
                found.greedy[fast] = first_differences(bundle, part, truth)
    if manifest.quantization is not None:
        text = found.chunks[0].name is not None
        costs = [cost(manifest, run, text, recalled) for run in found.runs.values()]
        found.quality = max(costs, key=lambda one: worst_of([one.kl]) or 0.0)
    return found


def kinds_of(manifest: Manifest) -> dict[bool, Manifest]:
    """The bundle with each of its prefills alone, by whether that one has int8 activations."""
    prefills = {graph.shape.int8_activations for graph in manifest.all_of("prefill")}
    return {
        fast: manifest.model_copy(
            update={
                "graphs": {
                    name: graph
                    for name, graph in manifest.graphs.items()
                    if graph.shape.role != "prefill" or graph.shape.int8_activations == fast
                }
            }
        )
        for fast in sorted(prefills)
    }


def count_tokenizer(bundle: Path, manifest: Manifest, checkpoint: Checkpoint) -> TokenizerCount | None:
    """How much of the corpus is equal; None where the checkpoint has no tokenizer."""
    found = equal_of_all(checkpoint.folder, bundle, manifest.model.vision is not None)
    if found is None:
        return None
    counted = {kind: Counted(equal=sum(same), total=len(same)) for kind, same in found.items()}
    return TokenizerCount(texts=counted["text"], chats=counted.get("chat"))
