"""Prove a bundle: the files that ship, in ONNX Runtime, against PyTorch, token by token.

Teacher-forced: every call gets the reference's tokens, so an error cannot hide behind another text. Slots
that a graph must not read are filled with large values. Graphs are loaded one at a time and after the
reference is gone, so that memory holds one model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

from stillgraph.cpu import cpu_name
from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.smoothing import shipped_smoothings
from stillgraph.exporter.staging import staged_file
from stillgraph.exporter.texts.passages import Text, default_texts, read_texts
from stillgraph.exporter.trace.half_range import beyond, magnitudes
from stillgraph.exporter.validate.cases import (
    Depth,
    ValidationPlan,
    make_plans,
    positions,
    random_ids,
    text_ids,
    written,
)
from stillgraph.exporter.validate.chunks import EXTENTS
from stillgraph.exporter.validate.dynamic_replay import dynamic_replay
from stillgraph.exporter.validate.fake_quantize import dequantize, smooth_unchanged
from stillgraph.exporter.validate.gates import Gate, gate, why
from stillgraph.exporter.validate.golden import make_golden
from stillgraph.exporter.validate.image import with_picture, without_pictures
from stillgraph.exporter.validate.kinds import Peak
from stillgraph.exporter.validate.measure_kinds import Measured, count_tokenizer, measure
from stillgraph.exporter.validate.page import write_page
from stillgraph.exporter.validate.reference import Reference, exact_reference, reference
from stillgraph.exporter.validate.replay import Replay
from stillgraph.exporter.validate.report import Agreement, CaseResult, Parity, TextKind, agree
from stillgraph.files import check_files, describe
from stillgraph.golden import GOLDEN, Golden
from stillgraph.manifest import MANIFEST, Manifest, read

STAGE = "validate"


def validate(
    bundle: Path,
    *,
    model: str | None = None,
    depth: Depth = "default",
    texts: Sequence[Path] = (),
    say: Say,
) -> Parity:
    """Validate a bundle, write its reports and its manifest's result, and return the report.

    model: the checkpoint, by default the one that the manifest names; depth: `quick` (optimized, random ids),
    `default`, or `full` (every slot of ctx in every setting); texts: files over which statistics are made, by
    default those that ship. Raises StillgraphError for bad input; a broken bound is a report with `passed`
    false.
    """
    own = read_texts(texts)
    manifest = read(bundle)
    check_files(bundle, manifest)
    if not any(graph.shape.caches for graph in manifest.graphs.values()):
        raise StillgraphError(STAGE, f"{bundle} has no prefill and no decode graph", "export one into it")
    plans = [*make_plans(manifest, depth), *written(manifest)]
    checkpoint = _checkpoint(bundle, manifest, model)
    used = own or default_texts(checkpoint.folder)[: EXTENTS[depth].texts]
    proof = Proof(bundle, manifest, checkpoint, used, say)
    measured = measure(bundle, manifest, checkpoint, used, depth, say)
    for part in proof.parts():
        proof.replay(part, plans)
    parity = proof.report(depth, measured)
    _write_reports(bundle, manifest, parity, proof.golden)
    return parity


class Proof:
    """One validation in progress. PyTorch's model is in memory only while it is asked, the graphs after
    it."""

    def __init__(
        self, bundle: Path, manifest: Manifest, checkpoint: Checkpoint, texts: Sequence[Text], say: Say
    ) -> None:
        self.bundle, self.manifest, self.checkpoint = bundle, manifest, checkpoint
        self.texts, self.say = texts, say
        self.cases: list[CaseResult] = []
        self.agreements: list[Agreement] = []
        self.peaks: tuple[Peak, ...] = ()
        self.golden: Golden | None = None

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
            smoothings = shipped_smoothings(self.bundle, part)
            smooth_unchanged(model, self.checkpoint.tied, smoothings, self.ids("random"))
            dequantize(model, self.bundle, part, _int8_activations(part))
        found: dict[TextKind, Reference] = {}
        for kind in dict.fromkeys(plan.text for plan in plans):
            of_kind = [plan for plan in plans if plan.text == kind]
            exact = any(gate_of(part, plan).kind == "own" for plan in of_kind)
            self.say(f"PyTorch's {'passes in float64 and fp32' if exact else 'pass'} over {kind} ids")
            wanted = {position for plan in of_kind for position in positions(part, plan)}
            vision = part.model.vision if kind == "picture" else None
            run = exact_reference if exact else reference
            found[kind] = run(model, self.ids(kind), wanted, vision)
        if part.precision == "fp16":
            self.say("measuring what fp16 must hold")
            self.peaks = self.measured_peaks(model)
        if self.golden is None and not _int8_activations(part):
            self.say("PyTorch's own text after the prompts of golden.json")
            self.golden = self.make_golden(model)
        return found

    def make_golden(self, model: nn.Module) -> Golden | None:
        kind: TextKind = "text" if (self.bundle / "tokenizer.json").is_file() else "random"
        text = without_pictures(self.ids(kind)[0], self.manifest.model.vision)
        return make_golden(self.bundle, self.manifest, self.checkpoint, model, text)

    def measured_peaks(self, model: nn.Module) -> tuple[Peak, ...]:
        """The largest magnitudes in products of fp16, over random ids and the texts; the largest first."""
        kinds: list[TextKind] = ["random"]
        kinds += ["text"] if (self.bundle / "tokenizer.json").is_file() else []
        found = magnitudes(model, map(self.ids, kinds), self.manifest.model.vision)
        half = {name: value for name, value in found.items() if name not in self.manifest.kept_fp32}
        return tuple(Peak(module=name, magnitude=value) for name, value in beyond(half, limit=-1).items())

    def report(self, depth: Depth, measured: Measured) -> Parity:
        """Of all cases that were replayed, and of what was measured over texts."""
        manifest, tools = self.manifest, ("torch", "transformers", "onnxruntime")
        return Parity(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            depth=depth,
            why_bound=why(manifest.model, manifest.precision),
            tools={name: importlib.metadata.version(name) for name in tools},
            cpu=cpu_name(),
            graphs={name: graph.file.sha256 for name, graph in manifest.graphs.items()},
            weights=manifest.weights.file.sha256,
            cases=tuple(self.cases),
            agreements=tuple(self.agreements),
            quality=measured.quality,
            kinds=measured.kinds(manifest, self.cases, self.peaks),
            peaks=self.peaks,
            tokenizer=count_tokenizer(self.bundle, manifest, self.checkpoint),
        )

    def ids(self, kind: TextKind) -> np.ndarray:
        if kind == "text":
            return text_ids(self.bundle, self.manifest, self.texts)
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


def _write_reports(bundle: Path, manifest: Manifest, parity: Parity, golden: Golden | None) -> None:
    (bundle / "reports").mkdir(exist_ok=True)
    staged_file(bundle / "reports" / "parity.json", parity.model_dump_json(indent=1) + "\n")
    staged_file(bundle / "reports" / "parity.html", write_page(manifest, parity))
    validated = manifest.model_copy(update={"validation": parity.validation()})
    if golden is not None:
        validated = _with_golden(bundle, validated, golden)
    staged_file(bundle / MANIFEST, validated.to_json())


def _with_golden(bundle: Path, manifest: Manifest, golden: Golden) -> Manifest:
    """Write golden.json, and list it in the manifest that is returned."""
    path, content = bundle / GOLDEN, golden.to_json()
    files = tuple(file for file in manifest.files if file.path != GOLDEN)
    if files != manifest.files and path.read_text(encoding="utf-8") != content:
        # A crash between two files must not leave one that the other does not fit.
        staged_file(bundle / MANIFEST, manifest.model_copy(update={"files": files}).to_json())
    staged_file(path, content)
    return manifest.model_copy(update={"files": (*files, describe(bundle, path))})
