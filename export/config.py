"""What an export was asked for, checked against the model before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from stillgraph.errors import StillgraphError
from stillgraph.exporter.calibration import NONE, SAMPLES
from stillgraph.exporter.few_bits import few_bits
from stillgraph.exporter.precisions import QUANTIZED
from stillgraph.exporter.targets import TARGETS
from stillgraph.manifest import Manifest, Precision, Quantization, Target
from stillgraph.spec import Frozen, GraphShape, ModelSpec

STAGE = "export"
Say = Callable[[str], None]  # called with a few words on what is being done, or a sentence that is to stay
ARTIFACTS = Path("artifacts")


class ExportConfig(Frozen):
    """One export: the checkpoint, where to, and what the graphs are written for.

    Sizes are not yet checked against a model; `shape` and `check` do that.
    """

    model: str = "demo"
    target: Target = "portable"
    precision: Precision = "fp32"
    quantization: Quantization | None = None
    calibrate: str = NONE
    batch: int = 1
    out: Path | None = None

    @property
    def place(self) -> Path:
        """The bundle's folder: `out`, or `artifacts/<model>`."""
        return self.out or ARTIFACTS / short_name(self.model)


def short_name(model: str) -> str:
    """The last part of a checkpoint's name, without the ending of a GGUF."""
    return Path(model).name.removesuffix(".gguf")


def request(
    *,
    block_size: int | None = None,
    asymmetric: bool | None = None,
    keep: Sequence[str] = (),
    fast_prefill: bool = False,
    calibrate: str = NONE,
    budget: float | None = None,
    kl: float | None = None,
    **values: Any,
) -> ExportConfig:
    """An ExportConfig of command-line values. Raises StillgraphError for values that do not go together."""
    target, precision = values["target"], values["precision"]
    for name, known in (("target", get_args(Target)), ("precision", get_args(Precision))):
        if values[name] not in known:
            problem = f"--{name} {values[name]!r} is not supported"
            raise StillgraphError(STAGE, problem, f"use {' or '.join(known)}")
    if precision not in (stored := TARGETS[target].precisions):
        problem = f"--precision {precision} cannot be stored by the ops of --target {target} on a CPU"
        raise StillgraphError(
            STAGE, problem, f"use {', '.join(stored[:-1])} or {stored[-1]}, or --target portable"
        )
    if values["batch"] < 1:
        raise StillgraphError(STAGE, f"--batch {values['batch']} is not a number of rows", "use 1 or more")
    if precision in QUANTIZED:
        if fast_prefill and not TARGETS[target].own_ops:
            problem = f"--fast-prefill is made of ops that --target {target} does not use"
            raise StillgraphError(STAGE, problem, "use --target onnxruntime")
        how = few_bits(precision, block_size, asymmetric, keep, calibrate, budget, kl)
        own = {"fast_prefill": fast_prefill, "refine": how.refine if TARGETS[target].own_ops else 0}
        values["quantization"] = how.model_copy(update=own)
    elif keep or fast_prefill or any(value is not None for value in (block_size, asymmetric, budget, kl)):
        named = "--block-size, --asymmetric, --keep, --budget, --kl and --fast-prefill"
        problem = f"{named} do nothing at --precision {precision}"
        raise StillgraphError(STAGE, problem, "leave them out, or use --precision int8 or int4")
    if precision not in QUANTIZED and calibrate not in (SAMPLES, NONE):
        problem = f"--calibrate does nothing at --precision {precision}"
        raise StillgraphError(STAGE, problem, "leave it out, or use --precision int8 or int4")
    return ExportConfig(**values, calibrate=calibrate)


def prefill_shape(config: ExportConfig, max_len: int, ctx: int | None) -> GraphShape:
    """A prefill of `max_len` tokens; with `ctx` it continues a cache. Raises StillgraphError."""
    for name, value in (("--max-len", max_len), ("--ctx", ctx)):
        if value is not None and value < 1:
            raise StillgraphError(STAGE, f"{name} {value} is not a number of tokens", "use 1 or more")
    if ctx is not None and max_len > ctx:
        raise StillgraphError(
            STAGE, f"--max-len {max_len} is over --ctx {ctx}", "lower --max-len or raise --ctx"
        )
    if (slack := TARGETS[config.target].slack) is None:
        return GraphShape(role="prefill", batch=config.batch, max_len=max_len, ctx=ctx)
    if ctx is None:
        problem = f"a prefill for --target {config.target} writes into the cache that the decode graph reads"
        raise StillgraphError(STAGE, problem, "give the --ctx of that cache")
    room = max(slack, max_len - 1)
    return GraphShape(role="prefill", batch=config.batch, max_len=max_len, ctx=ctx, slack=room)


def decode_shape(config: ExportConfig, ctx: int) -> GraphShape:
    """A decode over `ctx` cache slots. Raises StillgraphError."""
    if ctx < 2:
        raise StillgraphError(STAGE, f"--ctx {ctx} leaves no room for a next token", "use 2 or more")
    slack = TARGETS[config.target].slack
    return GraphShape(role="decode", batch=config.batch, max_len=1, ctx=ctx, slack=slack)


def dynamic_shape(config: ExportConfig, ctx: int) -> GraphShape:
    """A graph of growing lengths, which a runtime stops at `ctx` tokens. Raises StillgraphError.

    It is what static graphs are measured against: one row, fp32, portable ops.
    """
    if ctx < 2:
        raise StillgraphError(STAGE, f"--ctx {ctx} leaves no room for a next token", "use 2 or more")
    plain = {"target": "portable", "precision": "fp32", "batch": 1}
    for name, value in plain.items():
        if (given := getattr(config, name)) != value:
            problem = f"--{name} {given} is not made as a dynamic graph"
            raise StillgraphError(STAGE, problem, f"leave --{name} at {value}, or export a static bundle")
    return GraphShape(role="dynamic", max_len=ctx, ctx=ctx)


def with_int8_prefill(config: ExportConfig, shapes: Sequence[GraphShape]) -> list[GraphShape]:
    """The graphs, and where `--fast-prefill` asks for it a second prefill of int8 activations.

    The first stays: it shares the decode's weights, and `stillgraph compile` keeps the one that is faster.
    """
    fast = config.quantization is not None and config.quantization.fast_prefill
    prefills = [shape for shape in shapes if fast and shape.role == "prefill"]
    return [*shapes, *(shape.model_copy(update={"int8_activations": True}) for shape in prefills)]


def with_pictures(
    config: ExportConfig, spec: ModelSpec, shapes: Sequence[GraphShape], vision: bool | None
) -> list[GraphShape]:
    """The graphs of a model that takes pictures: its prefill has an embed graph before it.

    vision: whether the graph of the pictures themselves is wanted; None where there is one. Raises
    StillgraphError for a model without, and for a prompt that no picture fits into.
    """
    if spec.vision is None:
        if vision:
            problem = f"{config.model}: a {spec.architecture} takes no pictures"
            raise StillgraphError(STAGE, problem, "export prefill and decode, which are all of it")
        return list(shapes)
    found = list[GraphShape]()
    for shape in shapes:
        if shape.role == "prefill":
            found.append(GraphShape(role="embed", batch=shape.batch, max_len=shape.max_len))
            shape = shape.model_copy(update={"embeds": True})
        if shape.grows:
            problem = f"a dynamic graph of a {spec.architecture} is not made"
            raise StillgraphError(STAGE, problem, "export a static bundle")
        tokens, whole = spec.vision.image_tokens, spec.vision.bidirectional and shape.role == "prefill"
        if shape.limit <= tokens or (whole and shape.max_len < tokens):
            option = f"--ctx {shape.limit}" if shape.ctx else f"--max-len {shape.limit} without --ctx"
            if shape.limit > tokens:
                option = f"--max-len {shape.max_len}"
            problem = f"{option} has no room for a picture of {tokens} tokens"
            raise StillgraphError(STAGE, problem, f"raise it to {tokens} or more")
        found.append(shape)
    if vision is not False:
        found.append(GraphShape(role="vision", max_len=spec.vision.image_tokens))
    return found


def with_one_slack(shapes: Sequence[GraphShape]) -> list[GraphShape]:
    """Graphs of one bundle share their cache buffers, so all get the largest slack that one of them needs."""
    slacks = [shape.slack for shape in shapes if shape.slack is not None]
    return [shape.model_copy(update={"slack": max(slacks)}) if slacks else shape for shape in shapes]


def check_heads(spec: ModelSpec, target: Target) -> None:
    """Refuse layers that the target's attention op does not take. Raises StillgraphError."""
    traits = TARGETS[target]
    for index, layer in enumerate(spec.layers):
        if layer.head_dim % traits.head_multiple:
            problem = f"a head size of {layer.head_dim} is not a multiple of {traits.head_multiple},"
            problem += f" which {traits.attention} of --target {target} needs"
            raise StillgraphError(STAGE, problem, "use --target portable")
        if layer.kv_from is not None and traits.attention:
            problem = f"layer {index} reads keys and values of layer {layer.kv_from},"
            problem += f" which {traits.attention} of --target {target} cannot"
            raise StillgraphError(STAGE, problem, "use --target portable")


def check_positions(spec: ModelSpec, shape: GraphShape, limit: str = "max_position_embeddings") -> None:
    """Refuse a graph whose positions the model was not made for. Raises StillgraphError.

    limit: what the spec's max_position_embeddings are, in words.
    """
    if shape.caches and shape.limit > spec.max_position_embeddings:
        option = "--ctx" if shape.ctx else "--max-len"
        problem = f"{option} {shape.limit} is over the model's {limit} of {spec.max_position_embeddings}"
        raise StillgraphError(STAGE, problem, f"lower {option}")


def check_fits_bundle(
    config: ExportConfig, checkpoint_sha256: str, shape: GraphShape, former: Manifest
) -> None:
    """Refuse to put graphs of two checkpoints, targets, precisions or shapes into one bundle."""
    pairs: dict[str, tuple[object, object]] = {
        "checkpoint": (checkpoint_sha256[:12], former.source.checkpoint_sha256[:12]),
        "target": (config.target, former.target),
        "precision": (config.precision, former.precision),
        "quantization": (_asked(config.quantization), _asked(former.quantization)),
    }
    for entry in former.graphs.values():
        if entry.shape.role != shape.role and shape.caches and entry.shape.caches:
            growing = {True: "growing", False: "static"}
            pairs["lengths"] = (growing[shape.grows], growing[entry.shape.grows])
            pairs["batch"] = (shape.batch, entry.shape.batch)
            if shape.slack is not None and entry.shape.slack is not None:
                pairs["room for a --max-len of"] = (shape.slack + 1, entry.shape.slack + 1)
            if shape.ctx is not None and entry.shape.ctx is not None:
                pairs["ctx"] = (shape.ctx, entry.shape.ctx)
            elif shape.limit > entry.shape.limit and shape.role == "prefill":
                pairs["max_len at most ctx"] = (shape.limit, entry.shape.limit)
    for name, (new, old) in pairs.items():
        if new != old:
            problem = f"{config.place} holds a bundle with {name} {old}, and this export has {new}"
            raise StillgraphError(
                STAGE, problem, "give another --out, or replace it with 'stillgraph export bundle'"
            )


def _asked(quantization: Quantization | None) -> Quantization | None:
    """What an export was asked for, without what was measured."""
    return quantization and quantization.model_copy(update={"better": {}, "blocked": ()})
