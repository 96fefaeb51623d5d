"""A validation of a graph that another exporter made: the same cases, reference, measures and bounds."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stillgraph.certificate import Content, Place
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.prove.certify import Proven, common, write
from stillgraph.exporter.prove.diagnosis import diagnose
from stillgraph.exporter.prove.foreign import ForeignGraph, discover, find_graph
from stillgraph.exporter.prove.foreign_driver import ForeignDecoder, open_foreign
from stillgraph.exporter.prove.foreign_weights import use_weights_of
from stillgraph.exporter.texts.passages import default_texts
from stillgraph.exporter.validate.cases import (
    Depth,
    ValidationPlan,
    edges,
    make_plans,
    positions,
    random_ids,
    text_ids,
)
from stillgraph.exporter.validate.dynamic_replay import GrowingReplay
from stillgraph.exporter.validate.gates import Gate, gate, why
from stillgraph.exporter.validate.metrics import Magnitudes, compare
from stillgraph.exporter.validate.reference import Reference, exact_reference, reference
from stillgraph.exporter.validate.report import Agreement, CaseResult, Parity, TextKind, agree
from stillgraph.files import describe
from stillgraph.manifest import File, GraphEntry
from stillgraph.spec import GraphShape, ModelSpec

CTX = 1024  # tokens of a text, where the model and its windows ask for no other number
CHUNK = 128  # tokens that kernels and callers like to take at once
PAST_WINDOW = 8
SHARED = "in one buffer"
PROBE = 4  # tokens that tell whether keys and values are those of transformers
WITHOUT = 4.0  # times nearer to another reference, where weights have an error of their own
SAME_LAYOUT = 0.1  # RMS over RMS; of another order of heads or numbers it is over 1


@dataclass(frozen=True)
class ForeignSubject:
    """What `cases` asks of a manifest. Its one graph has the shape of our own growing graph."""

    model: ModelSpec
    graphs: dict[str, GraphEntry]

    def graph(self, role: str) -> GraphEntry | None:
        return self.graphs.get(role)

    @classmethod
    def of(cls, spec: ModelSpec, file: File, ctx: int) -> ForeignSubject:
        shape = GraphShape(role="dynamic", max_len=ctx, ctx=ctx)
        return cls(spec, {"dynamic": GraphEntry(shape=shape, file=file, inputs=(), outputs=(), aliases=())})


def prove_graph(
    subject: Path, *, model: str, depth: Depth = "default", ctx: int | None = None, say: Say
) -> Proven:
    """Compare a graph, or the one in a folder, with a checkpoint, and certify the result beside the graph.

    ctx: tokens of a text, by default enough to pass every window. Raises StillgraphError for what cannot be
    driven. A broken bound is a certificate of it, with what was found in sentences.
    """
    path = find_graph(subject)
    checkpoint = open_checkpoint(model)
    graph = discover(path, checkpoint.spec)
    open_foreign(graph, optimized=True)
    proof = ForeignProof(graph, checkpoint, depth, ctx, say)
    cases = [case for plan in proof.plans for case in proof.run(plan)]
    parity = Parity(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        depth=depth,
        why_bound=proof.why,
        tools={name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        graphs={path.name: proof.file.sha256},
        weights=describe(path.parent, path.parent / graph.data[0]).sha256
        if graph.data
        else proof.file.sha256,
        cases=tuple(cases),
        agreements=tuple(proof.agreements(cases)),
    )
    found = diagnose(parity, checkpoint.spec, proof.is_without_windows)
    place = Place.of(path)
    content = Content(
        subject="graph",
        identity={"graph": path.name, "checkpoint": checkpoint.sha256, "precision": graph.precision},
        findings=(*found, *proof.notes()),
        **common(parity, model),
        files=tuple(describe(path.parent, path.parent / name) for name in (path.name, *graph.data)),
    )
    return write(place, content, parity)


class ForeignProof:
    """One proof in progress. PyTorch's model is in memory only while it is asked."""

    def __init__(
        self, graph: ForeignGraph, checkpoint: Checkpoint, depth: Depth, ctx: int | None, say: Say
    ) -> None:
        self.graph, self.checkpoint, self.say = graph, checkpoint, say
        self.spec = checkpoint.spec
        self.file = describe(graph.path.parent, graph.path)
        self.ctx = min(ctx or _ctx(self.spec), self.spec.max_position_embeddings)
        self.subject = ForeignSubject.of(self.spec, self.file, self.ctx)
        self.why = why(self.spec, graph.precision)
        self.unknown: list[str] = []  # matrices of the graph that are no weight of the checkpoint
        self.plans = self._plans(depth)
        self.references = self._references()
        self.compares = graph.alike and (graph.rounds or self._same_layout())

    def run(self, plan: ValidationPlan) -> Iterator[CaseResult]:
        """Every case of a plan over keys and values that grow and, where they can, in one buffer."""
        for slots in (None, self.ctx) if self.graph.shares else (None,):
            given = SHARED if slots else ""
            self.say(f"{plan.text} ids, optimizations {'on' if plan.optimized else 'off'} {given}".rstrip())
            yield from self._replay(plan, self.references[plan.text], slots, given).run()

    def gate(self, plan: ValidationPlan) -> Gate:
        """As of a bundle: without packed weights only ops of integers round their inputs."""
        return gate(self.spec, self.graph.precision, plan.optimized or self.graph.integers)

    def agreements(self, cases: list[CaseResult]) -> Iterator[Agreement]:
        """Of each plan whose products round their inputs."""
        for plan in self.plans:
            own = [c for c in cases if (c.text, c.optimized) == (plan.text, plan.optimized)]
            if (held := self.gate(plan)).kind == "rounded":
                yield agree(own, held)

    def is_without_windows(self, case: CaseResult) -> bool:
        """Whether a case is what the model without its sliding windows gives, which is asked of PyTorch."""
        plan = ValidationPlan(case.text, case.optimized, (case.prompt,), ())
        self.say("PyTorch's pass without sliding windows")
        model = self._model()
        model.config.get_text_config().sliding_window = self.ctx + 1
        truth = self._reference(model, case.text, positions(self.subject, plan))
        slots = self.ctx if SHARED in case.given else None
        found = self._replay(plan, truth, slots, "").run()[0]
        if self.gate(plan).kind == "rounded":
            return mean_kl(found) < mean_kl(case) / WITHOUT
        return all(check.holds for check in found.checks if check.what == "logits")

    def notes(self) -> Iterator[str]:
        """What was not compared, or is not held to a bound."""
        if self.graph.rounds:
            yield self._cost()
        if self.unknown:
            yield (
                f"{len(self.unknown)} matrices of few bits, as {self.unknown[0]}, are not known:"
                " PyTorch computes with its own there."
            )
        if not self.compares:
            yield "Its keys and values are not laid out as transformers' are: logits alone are compared."
        for window in self.spec.windows:
            if window >= self.ctx:
                yield f"The window of {window} is not reached by texts of {self.ctx} tokens (--ctx)."

    def _replay(self, plan: ValidationPlan, truth: Reference, slots: int | None, given: str) -> GrowingReplay:
        decoder = ForeignDecoder(self.graph, self.spec, plan.optimized, slots, self.compares)
        return GrowingReplay(decoder, self.ctx, truth, plan, self.gate(plan), given)

    def _plans(self, depth: Depth) -> list[ValidationPlan]:
        """As of a bundle, and around a chunk."""
        more = {CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1}
        whole = tuple(sorted({*edges(self.subject), *(n for n in more if n < self.ctx)}))
        reads = (self.checkpoint.folder / "tokenizer.json").is_file()
        plans = [plan for plan in make_plans(self.subject, depth) if reads or plan.text != "text"]
        return [replace(plan, prompts=whole if len(plan.prompts) > 1 else plan.prompts) for plan in plans]

    def _references(self) -> dict[TextKind, Reference]:
        model = self._model()
        found: dict[TextKind, Reference] = {}
        for kind in dict.fromkeys(plan.text for plan in self.plans):
            self.say(f"PyTorch's pass over {kind} ids")
            wanted = {p for plan in self.plans if plan.text == kind for p in positions(self.subject, plan)}
            found[kind] = self._reference(model, kind, wanted)
        return found

    def _model(self) -> Any:
        """PyTorch's, with the weights of a graph of few bits."""
        self.say("loading PyTorch's model")
        model: Any = self.checkpoint.load()
        if self.graph.rounds:
            self.say("giving PyTorch's model the graph's weights")
            self.unknown = use_weights_of(self.graph, model)
        return model

    def _cost(self) -> str:
        """What weights of few bits cost against the checkpoint's own, by PyTorch alone."""
        kind, coded = next(iter(self.references.items()))
        own = reference(self.checkpoint.load(), coded.ids, set(coded.logits))
        found = [compare(0, at, own.logits[at][0], coded.logits[at][0]) for at in sorted(own.logits)]
        kl, equal = (float(np.mean([getattr(c, name) for c in found])) for name in ("kl", "top1_equal"))
        return (
            f"Its {self.graph.precision} weights, apart from the graph, cost a mean KL of {kl:.2g} nats and"
            f" {1 - equal:.0%} of best tokens against the checkpoint's own, after {kind} ids: no bound."
        )

    def _reference(self, model: Any, kind: TextKind, wanted: set[int]) -> Reference:
        folder = self.checkpoint.folder
        ids = (
            text_ids(folder, self.subject, default_texts(folder))
            if kind == "text"
            else random_ids(self.subject)
        )
        kinds = {self.gate(plan).kind for plan in self.plans if plan.text == kind}
        run = exact_reference if "own" in kinds else reference
        return run(model, ids, wanted)

    def _same_layout(self) -> bool:
        """Whether the first layer's keys and values of a few tokens are those of transformers."""
        truth = next(iter(self.references.values()))
        decoder = ForeignDecoder(self.graph, self.spec, False, None, compares=True)
        decoder.feed(truth.ids[:, :PROBE])
        layer, _, *blocks = next(decoder.held())
        for found, expected in zip(blocks, (truth.keys[layer], truth.values[layer]), strict=True):
            right = expected[0, :, :PROBE]
            error = Magnitudes.of(found - right).over(Magnitudes.of(right))
            if not error[0] < SAME_LAYOUT:
                return False
        return True


def _ctx(spec: ModelSpec) -> int:
    return max(CTX, max(spec.windows, default=0) + PAST_WINDOW)


def mean_kl(case: CaseResult) -> float:
    return float(np.mean([comparison.kl for comparison in case.comparisons]))
