"""`stillgraph export`, and the commands that work on what it made: `simplify`, `validate`, `inspect`.

torch and onnx are imported inside the commands: help and wrong use are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pydantic_core import to_json
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from export.config import ExportConfig, Say, decode_shape, prefill_shape, request
from runtime.errors import CheckFailed, StillgraphError
from runtime.manifest import Manifest

if TYPE_CHECKING:
    from export.parity import Parity
    from runtime.spec import GraphShape

FILE_WIDTH = 160  # of tables where stdout is no terminal: none of their cells is cut

app = typer.Typer(
    help="Make static ONNX graphs of a checkpoint. Two exports into one --out make one bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A hub id or a checkpoint folder.")]
Target = Annotated[str, typer.Option(help="What the graph is written for: portable.")]
Precision = Annotated[str, typer.Option(help="How weights are stored: fp32 or fp16.")]
Batch = Annotated[int, typer.Option(help="Rows of every graph.")]
Out = Annotated[Path | None, typer.Option(help="The bundle's folder.", show_default="artifacts/<model>")]
MaxLen = Annotated[int, typer.Option(help="Token slots of the prefill.")]
Ctx = Annotated[int, typer.Option(help="Slots of the cache.")]
ContinuedCtx = Annotated[
    int | None,
    typer.Option("--ctx", help="Continue a cache of this many slots.", show_default="starts from nothing"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="One line of JSON instead of the result's text.")]
Bundle = Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)]


@dataclass(frozen=True)
class Output:
    """Where a command speaks: results on stdout, progress on stderr."""

    quiet: bool
    as_json: bool

    @contextmanager
    def progress(self) -> Iterator[Say]:
        """Yield what shows the step at work: one line that changes, or lines where stderr is no terminal."""
        console = Console(stderr=True, quiet=self.quiet, highlight=False)
        if not console.is_terminal:
            yield lambda text: console.print(text, markup=False, soft_wrap=True)
            return
        with console.status("", spinner="line") as status:
            yield lambda text: status.update(escape(text))

    def result(self, line: dict[str, object], *shown: RenderableType) -> None:
        """One line of JSON, or the same for people."""
        if self.as_json:
            print(to_json(line, inf_nan_mode="null").decode(), flush=True)  # JSON has no NaN
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        for part in shown:
            console.print(part)


@app.command()
def prefill(
    max_len: MaxLen = 128,
    ctx: ContinuedCtx = None,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the graph for the prompt to a bundle. With --ctx it continues a cache."""
    config = request(model=model, target=target, precision=precision, batch=batch, out=out)
    _add(config, prefill_shape(config, max_len, ctx), Output(quiet, as_json))


@app.command()
def decode(
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the graph for each next token to a bundle."""
    config = request(model=model, target=target, precision=precision, batch=batch, out=out)
    _add(config, decode_shape(config, ctx), Output(quiet, as_json))


@app.command()
def bundle(
    max_len: MaxLen = 128,
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a new bundle of both graphs over one weights file, and validate it quickly.

    The prefill continues a cache of --ctx slots, so a prompt may be longer than --max-len.
    """
    config = request(model=model, target=target, precision=precision, batch=batch, out=out)
    shapes = [prefill_shape(config, max_len, ctx), decode_shape(config, ctx)]
    output = Output(quiet, as_json)
    with output.progress() as say:
        from export.bundle import export
        from export.validate import validate as prove

        manifest = export(config, shapes, replace=True, say=say)
        parity = prove(config.place, model=config.model, depth="quick", say=say)
    line = _exported(config.place, manifest) | {"validation": parity.summary()}
    output.result(line, _files(config.place, manifest), parity.table())
    _hold(config.place, parity)


def simplify(bundle: Bundle, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Simplify a bundle's graphs again, in place, with the steps of this version."""
    output = Output(quiet, as_json)
    with output.progress() as say:
        from export.resimplify import resimplify

        changes = resimplify(bundle, say)
    title = f"simplified {escape(str(bundle))}"
    table = Table("graph", "nodes before", "nodes after", "largest difference", title=title)
    for name, change in changes.items():
        nodes = f"{change.nodes_before}", f"{change.nodes_after}"
        table.add_row(name, *nodes, f"{change.worst_difference:.1e}")
    if not any(change.changed for change in changes.values()):
        table.caption = "no graph changed; the bundle is as it was"
    output.result({"bundle": str(bundle), "graphs": {k: v.model_dump() for k, v in changes.items()}}, table)


def validate(
    bundle: Bundle,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The checkpoint.", show_default="the one that the manifest names"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every slot of ctx in every setting.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Random ids, optimised graphs only.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a bundle's files, in ONNX Runtime, with PyTorch. Exit code 1 when a bound is broken."""
    if full and quick:
        raise StillgraphError("validate", "--full and --quick were both given", "give one of them")
    depth: Literal["quick", "default", "full"] = "full" if full else "quick" if quick else "default"
    output = Output(quiet, as_json)
    with output.progress() as say:
        from export.validate import validate as prove

        parity = prove(bundle, model=model, depth=depth, say=say)
    output.result({"bundle": str(bundle)} | parity.summary(), parity.table())
    _hold(bundle, parity)


def inspect(bundle: Bundle, as_json: AsJson = False) -> None:
    """Show what is in a bundle: files, ops, memory, valid ranges, the last validation."""
    from export.inspection import inspect as look
    from export.inspection import tables

    inspection = look(bundle)
    Output(quiet=True, as_json=as_json).result(inspection.model_dump(mode="json"), *tables(inspection))


def _add(config: ExportConfig, shape: GraphShape, output: Output) -> None:
    with output.progress() as say:
        from export.bundle import export

        manifest = export(config, [shape], replace=False, say=say)
    output.result(_exported(config.place, manifest), _files(config.place, manifest))


def _exported(place: Path, manifest: Manifest) -> dict[str, object]:
    return {
        "bundle": str(place),
        "graphs": {name: graph.file.path for name, graph in manifest.graphs.items()},
        "nbytes": sum(file.nbytes for file in manifest.all_files()),
    }


def _files(place: Path, manifest: Manifest) -> Table:
    table = Table("file", "bytes", title=f"bundle {escape(str(place))}")
    table.columns[1].justify = "right"
    for file in manifest.all_files():
        table.add_row(file.path, f"{file.nbytes:,}")
    return table


def _hold(bundle: Path, parity: Parity) -> None:
    if not parity.passed:
        worst = max(parity.max_relative_error, parity.max_cache_error)
        problem = f"a relative error of {worst:.2e} is over the bound of {parity.bound:.1e}"
        raise CheckFailed("validate", problem, f"see {bundle / 'reports' / 'parity.html'}")
