"""Make a bundle: trace, simplify, write weights once, and move it into place when it is whole."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from stillgraph.calling import Calling
from stillgraph.errors import StillgraphError
from stillgraph.exporter import weights
from stillgraph.exporter.bundle.calibration import Calibration, begin, forget
from stillgraph.exporter.bundle.calling import calling
from stillgraph.exporter.bundle.estimate import estimate, refuse
from stillgraph.exporter.bundle.needs import least_onnxruntime, of_nodes
from stillgraph.exporter.bundle.tokenizer_files import CONFIG, TEMPLATE, TOKENIZER, write_tokenizer
from stillgraph.exporter.checkpoint import CARRIED, Checkpoint, open_checkpoint
from stillgraph.exporter.config import (
    ExportConfig,
    Say,
    check_fits_bundle,
    check_heads,
    check_positions,
    with_int8_prefill,
    with_pictures,
)
from stillgraph.exporter.ir.fold_weights import Weight, take_out, take_out_constants, unrounded
from stillgraph.exporter.ir.node_names import name_the_rest
from stillgraph.exporter.ir.simplify import (
    SimplifyReport,
    as_report,
    check,
    primitive,
    same_outputs,
    simplify,
)
from stillgraph.exporter.memory import free_at_once, use_large_pages
from stillgraph.exporter.quantize.lower import StoragePlan, lower
from stillgraph.exporter.staging import staged
from stillgraph.exporter.trace.half_range import beyond, checkpoint_magnitudes
from stillgraph.exporter.trace.tracing import convert
from stillgraph.files import check_files, describe
from stillgraph.golden import GOLDEN
from stillgraph.manifest import (
    MANIFEST,
    Alias,
    CheckpointSource,
    GraphEntry,
    Manifest,
    Requires,
    Weights,
    read,
)
from stillgraph.ports import input_ports, output_ports, past_names, present_names
from stillgraph.spec import GraphShape

TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnxsim", "onnx-ir", "stillgraph")
SIMPLIFY_REPORT = "reports/simplify.json"
FILES = (*CARRIED, TOKENIZER, CONFIG, TEMPLATE)


@dataclass(frozen=True)
class Traced:
    """A graph between its trace and its file: structure before and after simplification, and its weights."""

    shape: GraphShape
    before: ir.Model
    after: ir.Model
    recipes: list[Weight]
    steps: list[dict[str, str | int | float]]


def export(
    config: ExportConfig, shapes: list[GraphShape], replace: bool, say: Say, vision: bool | None = False
) -> Manifest:
    """Export graphs into the bundle at `config.place`; with `replace` they make a new one.

    say is called with what is being done; vision: see `config.with_pictures`. Raises StillgraphError for bad
    input and CheckFailed where a graph does not pass its checks; in either case the previous bundle is as it
    was.
    """
    free_at_once()
    use_large_pages()
    say("reading the checkpoint")
    checkpoint = open_checkpoint(config.model)
    former = None if replace or not (config.place / MANIFEST).is_file() else read(config.place)
    shapes = with_int8_prefill(config, with_pictures(config, checkpoint.spec, shapes, vision))
    _check_shapes(config, checkpoint, shapes, former)
    if former is None:
        found = estimate(config, checkpoint, shapes)
        say(f"This takes {found}.")
        refuse(found, config.place)
    before, roles = former.graphs if former else {}, {shape.role for shape in shapes}
    kept = {name: graph for name, graph in before.items() if graph.shape.role not in roles}
    with staged(config.place) as folder:
        if former is not None:
            carry_over(config.place, folder, former)
        _carry(checkpoint, folder, say)
        # Before any work, since it refuses files that cannot be used.
        called = calling(checkpoint, [*(graph.shape for graph in kept.values()), *shapes], folder)
        config, smoothed, calibration = begin(config, checkpoint, former, folder, say)
        kept_fp32 = former.kept_fp32 if former else dict[str, float]()
        if former is None and config.precision == "fp16":
            say("measuring what fp16 cannot hold")
            kept_fp32 = beyond(checkpoint_magnitudes(checkpoint, folder, called.tokens))
        traced = [_trace(smoothed, shape, config, kept_fp32, say) for shape in shapes]
        stored = _write_weights(folder, smoothed, traced, former, calibration, say)
        graphs = kept | {
            entry.shape.name: _write_graph(folder, checkpoint, entry, stored) for entry in traced
        }
        _drop_unlisted(folder, graphs)
        _write_simplify_report(folder, traced, graphs, stored, say)
        manifest = _manifest(folder, checkpoint, config, kept_fp32, graphs, stored, called)
        checkpoint.check_unchanged()
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    forget(config.place)
    return manifest


def _check_shapes(
    config: ExportConfig, checkpoint: Checkpoint, shapes: list[GraphShape], former: Manifest | None
) -> None:
    """Refuse what target, model or the bundle that is there has no room for. Raises StillgraphError."""
    check_heads(checkpoint.spec, config.target)
    if former is not None:
        check_files(config.place, former)
    for shape in shapes:
        check_positions(checkpoint.spec, shape, checkpoint.family.limit(checkpoint.config))
        if former is not None:
            check_fits_bundle(config, checkpoint.sha256, shape, former)


def _trace(
    checkpoint: Checkpoint, shape: GraphShape, config: ExportConfig, kept_fp32: Collection[str], say: Say
) -> Traced:
    say(f"tracing {shape.name}")
    plan = None
    if config.quantization is not None:
        plan = StoragePlan.of(config.target, config.precision, config.quantization, shape, checkpoint.tied)
    model = convert(
        checkpoint,
        shape,
        config.target,
        config.precision,
        kept_fp32=kept_fp32,
        alike=lambda name: None if plan is None else plan.alike(name, shape),
    )
    recipes: list[Weight] = [*take_out(model, list(checkpoint.tensors))]
    before = primitive(model)
    say(f"simplifying {shape.name}")
    after, steps = simplify(model, shape.grows)
    if plan is not None:
        lower(before, recipes, plan)
        recipes = lower(after, recipes, plan)
        after = check(after)
    recipes += take_out_constants(after)
    name_the_rest(after)
    return Traced(shape, before, after, recipes, as_report(steps))


def carry_over(place: Path, folder: Path, former: Manifest) -> None:
    """Link the previous bundle's files; links, so that gigabytes are not copied to add a small graph."""
    for file in former.all_files():
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        link(place / file.path, target)


def link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _carry(checkpoint: Checkpoint, folder: Path, say: Say) -> None:
    """Copy the checkpoint's files that a runtime reads, and write its tokenizer."""
    for name in (*FILES, GOLDEN):  # the latter is of the graphs that were there
        (folder / name).unlink(missing_ok=True)  # it may be a link into the previous bundle
    for name in CARRIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    write_tokenizer(checkpoint.folder, folder, checkpoint.spec.vision is not None, say)


def _write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    traced: list[Traced],
    former: Manifest | None,
    calibration: Calibration | None,
    say: Say,
) -> Weights:
    recipes = list({recipe.name: recipe for entry in traced for recipe in entry.recipes}.values())
    recipes += checkpoint.smoothings
    known = former.weights if former else None
    missing = [recipe for recipe in recipes if known is None or recipe.name not in known.tensors]
    before = calibration.round(missing).get if calibration else unrounded
    say("writing weights")
    path = folder / weights.WEIGHTS_FILE
    linked = bool(known and missing and path.stat().st_nlink > 1)
    needed = sum(place.nbytes for place in weights.layout(missing).values())
    needed += known.file.nbytes if known and linked else 0
    if needed > (free := shutil.disk_usage(folder).free):
        problem = f"{needed / 1e9:.2f} GB of weights do not fit into {free / 1e9:.2f} GB of free disk space"
        raise StillgraphError("write weights", problem, "free space or give another --out")
    if linked:  # the previous bundle's file must not change under it
        private = path.with_suffix(".private")
        shutil.copyfile(path, private)
        private.replace(path)
    return weights.write(folder, recipes, checkpoint.tensor, known, rounded=before)


def _write_graph(folder: Path, checkpoint: Checkpoint, traced: Traced, stored: Weights) -> GraphEntry:
    spec, shape = checkpoint.spec, traced.shape
    path = folder / f"{shape.name}.onnx"
    path.unlink(missing_ok=True)  # it may be a link into the previous bundle
    described = of_nodes(weights.save_graph(traced.after, stored, path))
    pairs = [
        # A decode and a fused prefill write into their past; a portable prefill selects between two buffers.
        Alias(output=output, input=past, same_buffer=shape.role == "decode" or shape.slack is not None)
        for layer in spec.cached
        for output, past in zip(present_names(layer), past_names(layer), strict=True)
    ]
    return GraphEntry(
        shape=shape,
        file=describe(folder, path),
        inputs=input_ports(spec, shape),
        outputs=output_ports(spec, shape),
        aliases=tuple(pairs) if shape.ctx else (),
        **described,
    )


def _drop_unlisted(folder: Path, graphs: dict[str, GraphEntry]) -> None:
    for path in folder.glob("*.onnx"):
        if path.name not in {graph.file.path for graph in graphs.values()}:
            path.unlink()


def _write_simplify_report(
    folder: Path, traced: list[Traced], entries: dict[str, GraphEntry], stored: Weights, say: Say
) -> None:
    path = folder / SIMPLIFY_REPORT
    former = SimplifyReport.model_validate_json(path.read_text()) if path.is_file() else None
    graphs, differences = (dict(former.graphs), dict(former.worst_difference)) if former else ({}, {})
    for entry in traced:
        name = entry.shape.name
        say(f"checking {name} against the graph before simplification")
        unsimplified = folder / f".{name}.before.onnx"
        weights.save_graph(entry.before, stored, unsimplified)
        graphs[name] = entry.steps
        differences[name] = same_outputs(unsimplified, folder / f"{name}.onnx", entries[name].aliases)
        unsimplified.unlink()
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    report = SimplifyReport(graphs=graphs, worst_difference=differences)
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _manifest(
    folder: Path,
    checkpoint: Checkpoint,
    config: ExportConfig,
    kept_fp32: dict[str, float],
    graphs: dict[str, GraphEntry],
    stored: Weights,
    called: Calling,
) -> Manifest:
    files = [describe(folder, folder / name) for name in FILES if (folder / name).is_file()]
    return Manifest(
        source=CheckpointSource(
            id=config.model,
            model_type=checkpoint.family.model_type,
            checkpoint_sha256=checkpoint.sha256,
        ),
        model=checkpoint.spec,
        target=config.target,
        precision=config.precision,
        quantization=config.quantization,
        kept_fp32=kept_fp32,
        requires=Requires(onnxruntime=least_onnxruntime(graphs.values())),
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        graphs=graphs,
        weights=stored,
        calling=called,
        files=(*files, describe(folder, folder / SIMPLIFY_REPORT)),
    )
