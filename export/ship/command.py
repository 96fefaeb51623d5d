"""`stillgraph ship`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from stillgraph.errors import StillgraphError
from stillgraph.exporter.console import Output


def ship(
    bundle: Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)],
    runtime: Annotated[str, typer.Option("--for", help="The runtime, such as openvino.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="The shipped folder.", show_default="<bundle>-<runtime>")
    ] = None,
    soc: Annotated[
        str | None,
        typer.Option(help="The chip of --for qnn, or CPU of --for iree.", show_default="sm8650, x86-64-v3"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Write a bundle for another runtime, with a driver that was given golden.json, and its archive.

    Exit code 1 where the driver makes another text or other logits than golden.json says.
    """
    output = Output(quiet, as_json)
    with output.progress() as say:
        from stillgraph.exporter.ship.runtimes import runtimes
        from stillgraph.exporter.ship.ship import ship as write

        known = runtimes()
        if runtime not in known:
            remedy = f"use one of {', '.join(sorted(known))}"
            raise StillgraphError("ship", f"--for {runtime} is no runtime that is known", remedy)
        chosen = known[runtime] if soc is None else known[runtime].for_chip(soc)
        shipped = write(bundle, chosen, out, say)
    checked = shipped.checked
    table = Table("folder", "archive", "cases equal", "largest error", title=f"for {known[runtime].title}")
    told = f"{checked.equal} of {checked.cases}", f"{checked.worst:.1e}"
    table.add_row(escape(str(shipped.folder)), escape(str(shipped.archive)), *told)
    if checked.skipped:
        table.caption = f"not run: {escape('; '.join(checked.skipped))}"
    if checked.reason:
        table.caption = f"golden.json was not run: {escape(checked.reason)}"
    line = {"folder": str(shipped.folder), "archive": str(shipped.archive), "runtime": runtime}
    output.result(line | checked.model_dump(mode="json"), table)
