"""Prove a bundle: the files that ship, in ONNX Runtime, against PyTorch, token by token.

Teacher-forced: every call gets the reference's tokens, so an error cannot hide behind another text. Slots
that a graph must not read are filled with large values. Graphs are loaded one at a time and after the
reference is gone, so that memory holds one model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path

from export.cases import Depth, Plan, TextKind, make_plans, positions, random_ids, text_ids
from export.checkpoint import open_checkpoint
from export.config import Say
from export.parity import CaseResult, Parity, bound
from export.parity_page import write_page
from export.reference import Reference, reference
from export.replay import Replay
from export.staging import staged_file
from runtime.errors import StillgraphError
from runtime.manifest import MANIFEST, Manifest, check_files, read

STAGE = "validate"


def validate(bundle: Path, *, model: str | None = None, depth: Depth = "default", say: Say) -> Parity:
    """Validate a bundle, write its reports and its manifest's result, and return the report.

    model: the checkpoint, by default the one that the manifest names; depth: `quick` (optimised, random ids),
    `default`, or `full` (every slot of ctx in every setting). Raises StillgraphError for bad input; a broken
    bound is a report with `passed` false.
    """
    manifest = read(bundle)
    check_files(bundle, manifest)
    if not manifest.graphs:
        raise StillgraphError(STAGE, f"{bundle} has no graph", "export one into it")
    plans = make_plans(manifest, depth)
    references = _references(bundle, manifest, model, plans, say)
    cases: list[CaseResult] = []
    for plan in plans:
        say(f"{plan.text} ids, ONNX Runtime's optimisations {'on' if plan.optimised else 'off'}")
        cases += Replay(bundle, manifest, references[plan.text], plan, say).run()
    value, why = bound(manifest.model, manifest.precision)
    parity = Parity(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        depth=depth,
        bound=value,
        why_bound=why,
        tools={name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")},
        graphs={name: graph.file.sha256 for name, graph in manifest.graphs.items()},
        weights=manifest.weights.file.sha256,
        cases=tuple(cases),
    )
    _write_reports(bundle, manifest, parity)
    return parity


def _references(
    bundle: Path, manifest: Manifest, model: str | None, plans: list[Plan], say: Say
) -> dict[TextKind, Reference]:
    checkpoint = open_checkpoint(model or manifest.source.id)
    if checkpoint.sha256 != manifest.source.checkpoint_sha256:
        problem = f"{model or manifest.source.id} is not the checkpoint that {bundle} was made from"
        raise StillgraphError(STAGE, problem, "name that checkpoint with --model")
    say("loading PyTorch's model")
    original = checkpoint.load()
    references = {}
    for kind in dict.fromkeys(plan.text for plan in plans):
        say(f"PyTorch's pass over {kind} ids")
        ids = random_ids(manifest) if kind == "random" else text_ids(bundle, manifest)
        wanted = {position for plan in plans if plan.text == kind for position in positions(manifest, plan)}
        references[kind] = reference(original, ids, wanted)
    return references


def _write_reports(bundle: Path, manifest: Manifest, parity: Parity) -> None:
    (bundle / "reports").mkdir(exist_ok=True)
    staged_file(bundle / "reports" / "parity.json", parity.model_dump_json(indent=1) + "\n")
    staged_file(bundle / "reports" / "parity.html", write_page(manifest, parity))
    validated = manifest.model_copy(update={"validation": parity.validation()})
    staged_file(bundle / MANIFEST, validated.to_json())
