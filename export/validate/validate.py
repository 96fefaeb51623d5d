"""Prove a bundle: the files that ship, in ONNX Runtime, against PyTorch, token by token.

Teacher-forced: every call gets the reference's tokens, so an error cannot hide behind another text. Slots
that a graph must not read are filled with large values. Graphs are loaded one at a time and after the
reference is gone, so that memory holds one model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path

import numpy as np
from torch import nn

from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.checkpoint_folder import DEMO
from stillgraph.exporter.config import Say
from stillgraph.exporter.staging import staged_file
from stillgraph.exporter.validate.cases import (
    Depth,
    ValidationPlan,
    limit,
    make_plans,
    positions,
    random_ids,
    text_ids,
)
from stillgraph.exporter.validate.dynamic_replay import dynamic_replay
from stillgraph.exporter.validate.fake_quantize import dequantize
from stillgraph.exporter.validate.gates import Gate, gate, why
from stillgraph.exporter.validate.image import with_picture
from stillgraph.exporter.validate.page import write_page
from stillgraph.exporter.validate.quality import recall, summarize, walk, walked
from stillgraph.exporter.validate.reference import Reference, exact_reference, reference
from stillgraph.exporter.validate.replay import Replay
from stillgraph.exporter.validate.report import Agreement, CaseResult, Parity, TextKind, agree
from stillgraph.files import check_files
from stillgraph.manifest import MANIFEST, Manifest, Quality, read

STAGE = "validate"
QUICK_WALK = 256  # tokens of a text for the quality of weights


def validate(bundle: Path, *, model: str | None = None, depth: Depth = "default", say: Say) -> Parity:
    """Validate a bundle, write its reports and its manifest's result, and return the report.

    model: the checkpoint, by default the one that the manifest names; depth: `quick` (optimized, random ids),
    `default`, or `full` (every slot of ctx in every setting). Raises StillgraphError for bad input; a broken
    bound is a report with `passed` false.
    """
    manifest = read(bundle)
    check_files(bundle, manifest)
    if not any(graph.shape.caches for graph in manifest.graphs.values()):
        raise StillgraphError(STAGE, f"{bundle} has no prefill and no decode graph", "export one into it")
    plans = make_plans(manifest, depth)
    proof = Proof(bundle, manifest, _checkpoint(bundle, manifest, model), depth, say)
    quality = proof.quality() if manifest.quantization else None
    for part in proof.parts():
        proof.replay(part, plans)
    parity = Parity(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        depth=depth,
        why_bound=why(manifest.model, manifest.precision),
        tools={name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        graphs={name: graph.file.sha256 for name, graph in manifest.graphs.items()},
        weights=manifest.weights.file.sha256,
        cases=tuple(proof.cases),
        agreements=tuple(proof.agreements),
        quality=quality,
    )
    _write_reports(bundle, manifest, parity)
    return parity


class Proof:
    """One validation in progress. PyTorch's model is in memory only while it is asked, the graphs after
    it."""

    def __init__(
        self, bundle: Path, manifest: Manifest, checkpoint: Checkpoint, depth: Depth, say: Say
    ) -> None:
        self.bundle, self.manifest, self.checkpoint = bundle, manifest, checkpoint
        self.depth, self.say = depth, say
        self.cases: list[CaseResult] = []
        self.agreements: list[Agreement] = []

    def quality(self) -> Quality | None:
        """What the quantized weights cost; None for a bundle that lacks a graph."""
        manifest = self.manifest
        if manifest.graph("prefill") is None or manifest.graph("decode") is None:
            return None
        text = (self.bundle / "tokenizer.json").is_file()
        end = min(limit(manifest), QUICK_WALK) if self.depth == "quick" else limit(manifest)
        self.say("loading PyTorch's model")
        model = self.checkpoint.load()
        self.say("PyTorch's pass, for the quality of the weights")
        ids = self.ids("text" if text else "random")[:, : end + 1]
        original = reference(model, ids, walked(manifest, end))
        demo = self.checkpoint.folder == DEMO and self.depth != "quick"
        recalled = recall(self.bundle, manifest, model) if demo else None
        del model
        self.say("the same text through the graphs")
        divergences = walk(self.bundle, manifest, original, end)
        return summarize(manifest.precision, divergences, text, recalled)

    def parts(self) -> list[Manifest]:
        """The bundle's graphs of the same weights; a prefill of int8 activations has its own."""
        graphs = self.manifest.graphs
        own = {name: graph for name, graph in graphs.items() if graph.shape.int8_activations}
        shared = {name: graph for name, graph in graphs.items() if name not in own}
        seeing = {name: graph for name, graph in graphs.items() if not graph.shape.caches}
        parts = [shared, own | seeing] if own else [graphs]
        return [self.manifest.model_copy(update={"graphs": part}) for part in parts]

    def replay(self, part: Manifest, plans: list[ValidationPlan]) -> None:
        """Every case of some graphs that have the same weights, against PyTorch with these weights."""
        references = self.references(part, plans)
        runner = dynamic_replay if part.graph("dynamic") else Replay
        for plan in plans:
            self.say(f"{plan.text} ids, ONNX Runtime's optimizations {'on' if plan.optimized else 'off'}")
            held = gate_of(part, plan)
            cases = runner(self.bundle, part, references[plan.text], plan, held, self.say).run()
            self.cases += cases
            if cases and held.kind == "rounded":
                self.agreements.append(agree(cases, held))

    def references(self, part: Manifest, plans: list[ValidationPlan]) -> dict[TextKind, Reference]:
        """PyTorch's pass over each text; two where its own error is a bound."""
        self.say("loading PyTorch's model")
        model: nn.Module = self.checkpoint.load()
        if part.quantization is not None:
            self.say("giving PyTorch's model the quantized weights")
            dequantize(model, part, _int8_activations(part))
        found: dict[TextKind, Reference] = {}
        for kind in dict.fromkeys(plan.text for plan in plans):
            of_kind = [plan for plan in plans if plan.text == kind]
            exact = any(gate_of(part, plan).kind == "own" for plan in of_kind)
            self.say(f"PyTorch's {'passes in float64 and fp32' if exact else 'pass'} over {kind} ids")
            wanted = {position for plan in of_kind for position in positions(part, plan)}
            vision = part.model.vision if kind == "picture" else None
            run = exact_reference if exact else reference
            found[kind] = run(model, self.ids(kind), wanted, vision)
        return found

    def ids(self, kind: TextKind) -> np.ndarray:
        if kind == "text":
            return text_ids(self.bundle, self.manifest)
        ids, vision = random_ids(self.manifest), self.manifest.model.vision
        return with_picture(ids, vision) if kind == "picture" and vision else ids


def gate_of(part: Manifest, plan: ValidationPlan) -> Gate:
    """Without packed weights only the prefill that is written so rounds its inputs."""
    return gate(part.model, part.precision, plan.optimized or _int8_activations(part))


def _int8_activations(part: Manifest) -> bool:
    return any(graph.shape.int8_activations for graph in part.graphs.values())


def _checkpoint(bundle: Path, manifest: Manifest, model: str | None) -> Checkpoint:
    checkpoint = open_checkpoint(model or manifest.source.id)
    if checkpoint.sha256 != manifest.source.checkpoint_sha256:
        problem = f"{model or manifest.source.id} is not the checkpoint that {bundle} was made from"
        raise StillgraphError(STAGE, problem, "name that checkpoint with --model")
    return checkpoint


def _write_reports(bundle: Path, manifest: Manifest, parity: Parity) -> None:
    (bundle / "reports").mkdir(exist_ok=True)
    staged_file(bundle / "reports" / "parity.json", parity.model_dump_json(indent=1) + "\n")
    staged_file(bundle / "reports" / "parity.html", write_page(manifest, parity))
    validated = manifest.model_copy(update={"validation": parity.validation()})
    staged_file(bundle / MANIFEST, validated.to_json())
