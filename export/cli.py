"""`stillgraph export`.

torch and onnx are imported inside the commands, so that help and usage errors are instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from stillgraph.exporter.api import check_paths, make, require_passed
from stillgraph.exporter.calibration import SAMPLES
from stillgraph.exporter.commands import AsJson, Quiet, Texts
from stillgraph.exporter.config import (
    ARTIFACTS,
    ExportConfig,
    decode_shape,
    dynamic_shape,
    prefill_shape,
    request,
    short_name,
)
from stillgraph.exporter.console import Output
from stillgraph.exporter.few_bits import BUDGET
from stillgraph.manifest import Manifest

if TYPE_CHECKING:
    from stillgraph.spec import GraphShape

app = typer.Typer(
    help="Make static ONNX graphs of a checkpoint. Two exports into one --out make one bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="A hub id, a checkpoint folder or a GGUF file.")]
Target = Annotated[str, typer.Option(help="What the graph is written for: portable or onnxruntime.")]
Precision = Annotated[str, typer.Option(help="How weights are stored: fp32, fp16, int8 or int4.")]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Weights that share a scale, of int8 and int4: 32, 64 or 128.",
        show_default="64 with int4, else 32",
    ),
]
Asymmetric = Annotated[
    bool | None,
    typer.Option("--asymmetric/--symmetric", help="A zero point for each scale.", show_default="with int4"),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="PATTERN=PRECISION: weights kept otherwise, as lm_head=int8. May be repeated."),
]
FastPrefill = Annotated[
    bool, typer.Option("--fast-prefill", help="Give the prefill int8 weights of its own, for a short TTFT.")
]
Calibrate = Annotated[
    str,
    typer.Option(
        help="What int8 and int4 are made for: a text FILE, the model's own samples, or none.",
        metavar="FILE|samples|none",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Bits a weight of int4, which go to the weights that matter most.", show_default=f"{BUDGET}"
    ),
]
Divergence = Annotated[
    float | None,
    typer.Option(
        "--kl", help="Instead of --budget: nats of divergence that four bits may cost.", show_default=False
    ),
]
Batch = Annotated[int, typer.Option(help="Rows of every graph.")]
Out = Annotated[Path | None, typer.Option(help="The bundle's folder.", show_default="artifacts/<model>")]
MaxLen = Annotated[int, typer.Option(help="Tokens that the prefill takes at once.")]
Ctx = Annotated[int, typer.Option(help="Slots of the cache.")]
ContinuedCtx = Annotated[
    int | None,
    typer.Option("--ctx", help="Continue a cache of this many slots.", show_default="starts from nothing"),
]


@app.command()
def prefill(
    max_len: MaxLen = 128,
    ctx: ContinuedCtx = None,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = None,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    calibrate: Calibrate = SAMPLES,
    budget: Budget = None,
    kl: Divergence = None,
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
        calibrate=calibrate,
        budget=budget,
        kl=kl,
        batch=batch,
        out=out,
    )
    _add(config, [prefill_shape(config, max_len, ctx)], Output(quiet, as_json))


@app.command()
def decode(
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = None,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    calibrate: Calibrate = SAMPLES,
    budget: Budget = None,
    kl: Divergence = None,
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
        calibrate=calibrate,
        budget=budget,
        kl=kl,
        batch=batch,
        out=out,
    )
    _add(config, [decode_shape(config, ctx)], Output(quiet, as_json))


@app.command()
def vision(
    model: Annotated[str, typer.Option("--model", "-m", help="A hub id or a checkpoint folder.")],
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = None,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    calibrate: Calibrate = SAMPLES,
    budget: Budget = None,
    kl: Divergence = None,
    batch: Batch = 1,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the graph from a picture to its features to a bundle: tower and projector."""
    config = request(
        model=model,
        target=target,
        precision=precision,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=keep or (),
        fast_prefill=fast_prefill,
        calibrate=calibrate,
        budget=budget,
        kl=kl,
        batch=batch,
        out=out,
    )
    _add(config, [], Output(quiet, as_json), vision=True)


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
    config = ExportConfig(model=model, out=out or ARTIFACTS / f"{short_name(model)}-dynamic")
    _add(config, [dynamic_shape(config, ctx)], Output(quiet, as_json))


@app.command()
def bundle(
    max_len: MaxLen = 128,
    ctx: Ctx = 1024,
    model: Model = "demo",
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: BlockSize = None,
    asymmetric: Asymmetric = None,
    keep: Keep = None,
    fast_prefill: FastPrefill = False,
    calibrate: Calibrate = SAMPLES,
    budget: Budget = None,
    kl: Divergence = None,
    batch: Batch = 1,
    out: Out = None,
    validated: Annotated[
        bool,
        typer.Option("--validate/--no-validate", help="Compare with PyTorch, which takes most memory."),
    ] = True,
    text: Texts = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a new bundle of all graphs over one weights file, and validate it quickly.

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
        calibrate=calibrate,
        budget=budget,
        kl=kl,
        batch=batch,
        out=out,
    )
    output = Output(quiet, as_json)
    with output.progress() as say:
        manifest, parity = make(config, max_len, ctx, validated=validated, texts=text or (), say=say)
    line, files = _exported(config.place, manifest), _files(config.place, manifest)
    if parity is None:
        output.result(line, files)
        return
    from stillgraph.exporter.validate.table import all_tables

    output.result(line | {"validation": parity.summary()}, files, *all_tables(manifest, parity))
    require_passed(config.place, parity)


def _add(config: ExportConfig, shapes: list[GraphShape], output: Output, vision: bool = False) -> None:
    check_paths(config)
    with output.progress() as say:
        from stillgraph.exporter.bundle.build import export

        manifest = export(config, shapes, replace=False, say=say, vision=vision)
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
