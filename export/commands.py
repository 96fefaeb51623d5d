"""The commands that work on a bundle: `simplify`, `compile`, `validate`, `inspect`.

torch and onnx are imported inside the commands, so that help and usage errors are instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from stillgraph.errors import StillgraphError
from stillgraph.exporter.api import require_passed
from stillgraph.exporter.checkpoint_folder import check_folder
from stillgraph.exporter.console import Output
from stillgraph.files import check_files
from stillgraph.manifest import Manifest, read

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead of the result's text.")]
CheckHashes = Annotated[
    bool, typer.Option("--check-hashes", help="Compare every file's SHA-256, not only its page sums.")
]
Bundle = Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)]


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
    bundle: Bundle,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The checkpoint.", show_default="the one that the manifest names"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every slot of ctx in every setting.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Random ids, optimized graphs only.")] = False,
    check_hashes: CheckHashes = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle's files, in ONNX Runtime, with PyTorch. Exit code 1 when a bound is broken."""
    if full and quick:
        raise StillgraphError("validate", "--full and --quick were both given", "give one of them")
    manifest = _checked(bundle, check_hashes)
    check_folder(model or manifest.source.id)
    depth: Literal["quick", "default", "full"] = "full" if full else "quick" if quick else "default"
    output = Output(quiet, as_json)
    with output.progress() as say:
        from stillgraph.exporter.validate.validate import validate as prove

        parity = prove(bundle, model=model, depth=depth, say=say)
    output.result({"bundle": str(bundle)} | parity.summary(), *parity.tables())
    require_passed(bundle, parity)


def inspect(bundle: Bundle, check_hashes: CheckHashes = False, as_json: AsJson = False) -> None:
    """Show what is in a bundle: files, ops, memory, valid ranges, the last validation."""
    _checked(bundle, check_hashes)
    from stillgraph.exporter.bundle.inspection import inspect as look
    from stillgraph.exporter.bundle.inspection import tables

    inspection = look(bundle)
    Output(quiet=True, as_json=as_json).result(inspection.model_dump(mode="json"), *tables(inspection))


def _checked(bundle: Path, hashes: bool = False) -> Manifest:
    """A bundle's manifest, its files whole. Raises StillgraphError, before torch or onnx is imported."""
    manifest = read(bundle)
    check_files(bundle, manifest, hashes, sums=True)
    return manifest
