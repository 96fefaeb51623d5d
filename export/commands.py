"""The commands that work on a bundle: `simplify`, `compile`, `validate`, `inspect`, `prove`.

torch and onnx are imported inside the commands, so that help and usage errors are instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from stillgraph.certificate import Content, differences
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.api import require_passed
from stillgraph.exporter.checkpoint_folder import check_folder, folder_of
from stillgraph.exporter.console import Output
from stillgraph.exporter.texts.passages import read_texts
from stillgraph.files import check_files
from stillgraph.manifest import MANIFEST, Manifest, read

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead of the result's text.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", help="Make statistics over this text. May be repeated.", show_default="texts that ship"
    ),
]
CheckHashes = Annotated[
    bool, typer.Option("--check-hashes", help="Compare every file's SHA-256, not only its page sums.")
]
Bundle = Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)]


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="The checkpoint.", show_default="the one that the manifest names"),
]
Full = Annotated[bool, typer.Option("--full", help="Every slot of ctx in every setting.")]
Quick = Annotated[bool, typer.Option("--quick", help="Random ids, optimized graphs only.")]


def simplify(bundle: Bundle, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Simplify a bundle's graphs again, in place, with the steps of this version."""
    _checked(bundle)
    output = Output(quiet, as_json)
    with output.progress() as say:
        from stillgraph.exporter.bundle.resimplify import resimplify

        changes = resimplify(bundle, say)
    title = f"simplified {escape(str(bundle))}"
    table = Table("graph", "nodes before", "nodes after", "largest difference", title=title)
    for name, change in changes.items():
        nodes = f"{change.nodes_before}", f"{change.nodes_after}"
        table.add_row(name, *nodes, f"{change.worst_difference:.1e}")
    if not any(change.changed for change in changes.values()):
        table.caption = "no graph changed; the bundle is as it was"
    output.result({"bundle": str(bundle), "graphs": {k: v.model_dump() for k, v in changes.items()}}, table)


def compile_(
    bundle: Bundle,
    pack_fp32: Annotated[
        bool, typer.Option("--pack-fp32", help="Pack weights of fp32 too: faster prefill, twice the disk.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Optimize a bundle's graphs and pack its weights for this machine, once instead of at every load."""
    _checked(bundle)
    output = Output(quiet, as_json)
    with output.progress() as say:
        from stillgraph.exporter.compile.compile import compile_bundle
        from stillgraph.exporter.compile.product_times import product_table

        compiled = compile_bundle(bundle, say, pack_fp32)
    table = Table("file", "bytes", title=f"compiled {escape(str(bundle))} for {compiled.cpu}")
    table.columns[1].justify = "right"
    for file in compiled.files():
        table.add_row(file.path, f"{file.nbytes:,}")
    table.caption = f"largest difference {max(graph.worst_difference for graph in compiled.graphs):.1e}"
    tables = [table, product_table(compiled.products)] if compiled.products else [table]
    output.result({"bundle": str(bundle)} | compiled.model_dump(mode="json"), *tables)


def validate(
    bundles: Annotated[
        list[Path], typer.Argument(help="Folders made by 'stillgraph export'.", show_default=False)
    ],
    model: Model = None,
    full: Full = False,
    quick: Quick = False,
    text: Texts = None,
    table: Annotated[
        Path | None, typer.Option(help="Write all bundles side by side, as Markdown or, to *.json, as JSON.")
    ] = None,
    check_hashes: CheckHashes = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare bundles' files, in ONNX Runtime, with PyTorch. Exit code 1 when a bound is broken."""
    depth = _depth("validate", full, quick)
    manifests = [_checked(bundle, check_hashes) for bundle in bundles]
    if table is not None:
        _check_table(table, manifests)
    read_texts(text or ())
    for name in [model] if model else [manifest.source.id for manifest in manifests]:
        check_folder(name)
    output, parities = Output(quiet, as_json), []
    for bundle, manifest in zip(bundles, manifests, strict=True):
        with output.progress() as say:
            from stillgraph.exporter.validate.table import all_tables, write_table
            from stillgraph.exporter.validate.validate import validate as prove

            parity = prove(bundle, model=model, depth=depth, texts=text or (), say=say)
        output.result({"bundle": str(bundle)} | parity.summary(), *all_tables(manifest, parity))
        parities.append(parity)
    if table is not None:
        write_table(table, list(zip(manifests, parities, strict=True)))
    for bundle, parity in zip(bundles, parities, strict=True):
        require_passed(bundle, parity)


def _check_table(path: Path, manifests: Sequence[Manifest]) -> None:
    """Raises StillgraphError for a table that cannot be written, and for bundles that it cannot compare."""
    if not path.parent.is_dir():
        raise StillgraphError("validate", f"--table {path}: no such folder", "make it, or name another file")
    if path.is_dir():
        raise StillgraphError("validate", f"--table {path} is a folder", "name a file")
    if len({manifest.source.checkpoint_sha256 for manifest in manifests}) > 1:
        problem = "bundles of different checkpoints were given with --table"
        raise StillgraphError("validate", problem, "write a table for each checkpoint")


def inspect(bundle: Bundle, check_hashes: CheckHashes = False, as_json: AsJson = False) -> None:
    """Show what is in a bundle: files, ops, memory, valid ranges, the last validation."""
    _checked(bundle, check_hashes)
    from stillgraph.exporter.bundle.inspection import inspect as look
    from stillgraph.exporter.bundle.inspection_tables import tables

    inspection = look(bundle)
    Output(quiet=True, as_json=as_json).result(inspection.model_dump(mode="json"), *tables(inspection))


def prove(
    subject: Annotated[Path, typer.Argument(help="A bundle, or an ONNX decoder of another exporter.")],
    check: Annotated[
        bool, typer.Option("--check", help="Compare files with the certificate that is there; without torch.")
    ] = False,
    model: Model = None,
    ctx: Annotated[
        int | None, typer.Option(help="Of a graph: tokens of a text.", show_default="past every window")
    ] = None,
    full: Full = False,
    quick: Quick = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Validate, and certify the result of these very files: one JSON and one page. Exit code as of validate.

    A graph of another exporter has past_key_values and present of each layer, and needs --model. With
    --check: exit code 1 where anything is not as the certificate says, a line for each.
    """
    output = Output(quiet, as_json)
    if check:
        _check_certificate(subject, model, output)
        return
    depth = _depth("prove", full, quick)
    manifest = None if _is_graph(subject) else _checked(subject)
    _check_use(subject, manifest, model, ctx)
    with output.progress() as say:
        if manifest is None:
            from stillgraph.exporter.prove.foreign_proof import prove_graph

            proven = prove_graph(subject, model=str(model), depth=depth, ctx=ctx, say=say)
        else:
            from stillgraph.exporter.prove.certify import prove_bundle

            proven = prove_bundle(subject, model=model, depth=depth, say=say)
    content, place, digest = proven.certificate.content, proven.place, proven.certificate.sha256
    line = {"certificate": str(place.certificate), "page": str(place.page), "sha256": digest}
    said = *content.findings, f"certificate {place.certificate}, SHA-256 {digest}"
    found = {"passed": content.passed, "findings": content.findings}
    output.result(line | found, proven.parity.table(), _verdicts(content), *map(escape, said))
    if problem := proven.parity.problem():
        raise CheckFailed("prove", problem, f"see {place.page}")


def _verdicts(content: Content) -> Table:
    """One line a kind of bound."""
    table = Table("of", "measure", "worst", "bound", "broken", "where", title="every kind of bound")
    for verdict in content.verdicts:
        numbers = f"{verdict.value:.2e}", f"{verdict.bound:.2e}", f"{verdict.broken}"
        style = "bold red" if verdict.broken else None
        table.add_row(verdict.of, verdict.measure, *numbers, escape(verdict.where), style=style)
    return table


def _is_graph(subject: Path) -> bool:
    """Whether a path is of a graph of another exporter, or of a folder with one."""
    if (subject / MANIFEST).is_file():
        return False
    return subject.is_file() or any([*subject.glob("*.onnx"), *subject.glob("onnx/*.onnx")])


def _check_use(subject: Path, manifest: Manifest | None, model: str | None, ctx: int | None) -> None:
    """Raises StillgraphError for options that do not fit what is proven, before torch is imported."""
    if manifest is None and model is None:
        problem = f"{subject} is no bundle that names its checkpoint"
        raise StillgraphError("prove", problem, "name the checkpoint with --model")
    if manifest is not None and ctx is not None:
        raise StillgraphError("prove", f"--ctx is of a graph, and {subject} is a bundle", "leave it out")
    if ctx is not None and ctx < 2:
        raise StillgraphError("prove", f"--ctx {ctx} leaves no room for a next token", "use 2 or more")
    check_folder(model or manifest.source.id if manifest else str(model))


def _check_certificate(subject: Path, model: str | None, output: Output) -> None:
    """Raises CheckFailed where something differs, after a line for each."""
    certificate, lines = differences(subject, folder_of(model) if model else None)
    content = certificate.content
    same = (
        f"{subject}: {len(content.files)} files are as proven on {content.date}, SHA-256 {certificate.sha256}"
    )
    output.result(
        {"sha256": certificate.sha256, "passed": content.passed, "differences": lines},
        *map(escape, lines or [same, *content.findings]),
    )
    if lines:
        told = f"{subject} differs from its certificate in {len(lines)} things"
        raise CheckFailed("prove", told, "get the files again, or prove these")


def _depth(stage: str, full: bool, quick: bool) -> Literal["quick", "default", "full"]:
    if full and quick:
        raise StillgraphError(stage, "--full and --quick were both given", "give one of them")
    return "full" if full else "quick" if quick else "default"


def _checked(bundle: Path, hashes: bool = False) -> Manifest:
    """A bundle's manifest, its files whole. Raises StillgraphError, before torch or onnx is imported."""
    manifest = read(bundle)
    check_files(bundle, manifest, hashes, sums=True)
    return manifest
