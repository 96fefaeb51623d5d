"""`stillgraph export`, and the commands that work on what it made: `simplify`, `validate`, `inspect`.

torch and onnx are imported inside the commands: help and wrong use are told at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from export.config import (
    ARTIFACTS,
    ExportConfig,
    decode_shape,
    dynamic_shape,
    prefill_shape,
    request,
    with_one_slack,
)
from export.output import Output
from runtime.errors import CheckFailed, StillgraphError
from runtime.manifest import Manifest

if TYPE_CHECKING:
    from export.parity import Parity
    from runtime.spec import GraphShape

app = typer.Typer(
    help="Make static ONNX graphs of a checkpoint. Two exports into one --out make one bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A hub id or a checkpoint folder.")]
Target = Annotated[str, typer.Option(help="What the graph is written for: portable or onnxruntime.")]
Precision = Annotated[str, typer.Option(help="How weights are stored: fp32, fp16, int8 or int4.")]
BlockSize = Annotated[
    int | None,
    typer.Option(help="Weights that share a scale, of int8 and int4: 32, 64 or 128.", show_default="128"),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="A zero point for each scale.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=PRECISION: weights kept otherwise, as lm_head=int8. May be repeated."),
]
FastPrefill = Annotated[
    bool, typer.Option("--fast-prefill", help="Give the prefill int8 weights of its own, for a short TTFT.")
]
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


@app.command()
def prefill(
    max_len: MaxLen = 128,
    ctx: ContinuedCtx = None,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the graph for the prompt to a bundle. With --ctx it continues a cache."""
    config = request(
        model=model,
        target=target,
        precision=precision,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep or (),
        fast_prefill=fast_prefill,
        batch=batch,
        out=out,
    )
    _add(config, prefill_shape(config, max_len, ctx), Output(quiet, as_json))


@app.command()
def decode(
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the graph for each next token to a bundle."""
    config = request(
        model=model,
        target=target,
        precision=precision,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep or (),
        fast_prefill=fast_prefill,
        batch=batch,
        out=out,
    )
    _add(config, decode_shape(config, ctx), Output(quiet, as_json))


@app.command()
def dynamic(
    ctx: Annotated[int, typer.Option(help="Tokens at which a text ends.")] = 1024,
    model: Model = "demo",
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder.", show_default="artifacts/<model>-dynamic")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make the same model as one fp32 graph of growing lengths, to measure static graphs against."""
    config = ExportConfig(model=model, out=out or ARTIFACTS / f"{Path(model).name}-dynamic")
    _add(config, dynamic_shape(config, ctx), Output(quiet, as_json))


@app.command()
def bundle(
    max_len: MaxLen = 128,
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = False,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    batch: Batch = 1,
    out: Out = None,
    validated: Annotated[
        bool,
        typer.Option("--validate/--no-validate", help="Compare with PyTorch, which takes most memory."),
    ] = True,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a new bundle of both graphs over one weights file, and validate it quickly.

    The prefill continues a cache of --ctx slots, so a prompt may be longer than --max-len.
    """
    config = request(
        model=model,
        target=target,
        precision=precision,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep or (),
        fast_prefill=fast_prefill,
        batch=batch,
        out=out,
    )
    shapes = with_one_slack([prefill_shape(config, max_len, ctx), decode_shape(config, ctx)])
    output = Output(quiet, as_json)
    with output.progress() as say:
        from export.bundle import export
        from export.validate import validate as prove

        manifest = export(config, shapes, replace=True, say=say)
        parity = prove(config.place, model=config.model, depth="quick", say=say) if validated else None
    line, files = _exported(config.place, manifest), _files(config.place, manifest)
    if parity is None:
        output.result(line, files)
        return
    output.result(line | {"validation": parity.summary()}, files, *parity.tables())
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


def compile_(
    bundle: Bundle,
    pack_fp32: Annotated[
        bool, typer.Option("--pack-fp32", help="Pack weights of fp32 too: faster prefill, twice the disk.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Optimise a bundle's graphs and pack its weights for this machine, once instead of at every load."""
    output = Output(quiet, as_json)
    with output.progress() as say:
        from export.compile import compile_bundle

        compiled = compile_bundle(bundle, say, pack_fp32)
    table = Table("file", "bytes", title=f"compiled {escape(str(bundle))} for {compiled.cpu}")
    table.columns[1].justify = "right"
    for file in compiled.files():
        table.add_row(file.path, f"{file.nbytes:,}")
    table.caption = f"largest difference {max(graph.worst_difference for graph in compiled.graphs):.1e}"
    output.result({"bundle": str(bundle)} | compiled.model_dump(mode="json"), table)


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
    output.result({"bundle": str(bundle)} | parity.summary(), *parity.tables())
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
    if problem := parity.problem():
        raise CheckFailed("validate", problem, f"see {bundle / 'reports' / 'parity.html'}")
