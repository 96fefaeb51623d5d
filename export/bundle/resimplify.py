"""Simplify the graphs of a finished bundle again, in place: for a bundle that an older version made."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from stillgraph.errors import StillgraphError
from stillgraph.exporter import weights
from stillgraph.exporter.bundle.build import SIMPLIFY_REPORT, carry_over
from stillgraph.exporter.bundle.needs import of_nodes
from stillgraph.exporter.config import Say
from stillgraph.exporter.ir.simplify import SimplifyReport, as_report, same_outputs, simplify
from stillgraph.exporter.staging import staged
from stillgraph.files import check_files, describe
from stillgraph.manifest import MANIFEST, File, GraphEntry, Manifest, read
from stillgraph.spec import Frozen

STAGE = "simplify"


class Change(Frozen):
    """What came of one graph: its nodes, and its outputs' largest relative difference, before and after."""

    changed: bool
    nodes_before: int
    nodes_after: int
    worst_difference: float


@dataclass(frozen=True)
class Again:
    """A graph file's content after another simplification, what the manifest says of its nodes, and the
    report of its steps."""

    content: bytes
    described: dict[str, object]
    changed: bool
    steps: list[dict[str, str | int | float]]


def resimplify(bundle: Path, say: Say) -> dict[str, Change]:
    """Run today's steps on every graph; by graph, what came of it. The weights file stays as it is.

    Where a graph changed the manifest gets its new hash and loses the result of the last validation, which
    was another graph's. Where none did the bundle is not touched. Raises StillgraphError for a bundle that is
    not whole and CheckFailed where a graph would compute something else; the bundle is then as it was.
    """
    manifest = read(bundle)
    check_files(bundle, manifest)
    results = {name: _simplified(bundle, entry, manifest, say) for name, entry in manifest.graphs.items()}
    differences = dict.fromkeys(results, 0.0)
    if any(result.changed for result in results.values()):
        with staged(bundle) as folder:
            carry_over(bundle, folder, manifest)
            differences = _write_graphs(bundle, folder, manifest, results, say)
            report = _write_report(folder, results, differences)
            changed = _manifest(folder, manifest, results, report)
            (folder / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return {
        name: Change(
            changed=result.changed,
            nodes_before=int(result.steps[0]["nodes_before"]),
            nodes_after=int(result.steps[-1]["nodes_after"]),
            worst_difference=differences[name],
        )
        for name, result in results.items()
    }


def _simplified(bundle: Path, entry: GraphEntry, manifest: Manifest, say: Say) -> Again:
    path = bundle / entry.file.path
    say(f"simplifying {path.name}")
    try:
        model = weights.load_graph(path)
    except Exception as error:  # the protobuf parser raises undocumented exceptions
        problem = f"{path} is not an ONNX graph ({' '.join(str(error).split())})"
        raise StillgraphError(STAGE, problem, "export the bundle again") from error
    simplified, steps = simplify(model, entry.shape.grows)
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / path.name
        described = of_nodes(weights.save_graph(simplified, manifest.weights, again))
        content = again.read_bytes()
    former = onnx.load(path, load_external_data=False)
    changed = not _same_graph(onnx.load_from_string(content).graph, former.graph)
    return Again(content, described, changed, as_report(steps))


def _same_graph(first: onnx.GraphProto, second: onnx.GraphProto) -> bool:
    """Whether two graphs have the same nodes and constants; constants have no order."""
    if list(first.node) != list(second.node):
        return False
    tensors = ({tensor.name: tensor for tensor in graph.initializer} for graph in (first, second))
    return next(tensors) == next(tensors)


def _write_graphs(
    bundle: Path, folder: Path, manifest: Manifest, results: dict[str, Again], say: Say
) -> dict[str, float]:
    differences = {}
    for name, result in results.items():
        path = folder / manifest.graphs[name].file.path
        path.unlink()  # a link into the bundle, which must not change under it
        path.write_bytes(result.content)
        say(f"checking {name} against the graph before")
        differences[name] = same_outputs(bundle / path.name, path, manifest.graphs[name].aliases)
    return differences


def _write_report(folder: Path, results: dict[str, Again], differences: dict[str, float]) -> File:
    path = folder / SIMPLIFY_REPORT
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    steps = {name: result.steps for name, result in results.items()}
    report = SimplifyReport(graphs=steps, worst_difference=differences)
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return describe(folder, path)


def _manifest(folder: Path, manifest: Manifest, results: dict[str, Again], report: File) -> Manifest:
    graphs = {
        name: entry.model_copy(
            update={"file": describe(folder, folder / entry.file.path), **results[name].described}
        )
        for name, entry in manifest.graphs.items()
    }
    files = (*(file for file in manifest.files if file.path != report.path), report)
    return manifest.model_copy(update={"graphs": graphs, "files": files, "validation": None})
