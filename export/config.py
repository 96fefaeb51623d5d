"""What the user asked an export to make, checked against the model before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import StillgraphError
from runtime.manifest import Manifest, Precision, Target
from runtime.spec import Frozen, GraphShape, ModelSpec

STAGE = "export"
Say = Callable[[str], None]  # told, in a few words, what is being done
ARTIFACTS = Path("artifacts")


class ExportConfig(Frozen):
    """One export: the checkpoint, where to, and what the graphs are written for.

    Sizes are not yet checked against a model; `shape` and `check` do that.
    """

    model: str = "demo"
    target: Target = "portable"
    precision: Precision = "fp32"
    batch: int = 1
    out: Path | None = None

    @property
    def place(self) -> Path:
        """The bundle's folder: `out`, or `artifacts/<model>`."""
        return self.out or ARTIFACTS / Path(self.model).name


def request(**values: Any) -> ExportConfig:
    """An ExportConfig of command-line values. Raises StillgraphError for a target or precision not built."""
    built: dict[str, tuple[str, ...]] = {"target": ("portable",), "precision": ("fp32", "fp16")}
    for name, known in built.items():
        if values[name] not in known:
            problem = f"--{name} {values[name]!r} is not supported"
            raise StillgraphError(STAGE, problem, f"use {' or '.join(known)}")
    if values["batch"] < 1:
        raise StillgraphError(STAGE, f"--batch {values['batch']} is not a number of rows", "use 1 or more")
    return ExportConfig(**values)


def prefill_shape(config: ExportConfig, max_len: int, ctx: int | None) -> GraphShape:
    """A prefill of `max_len` slots; with `ctx` it continues a cache. Raises StillgraphError."""
    for name, value in (("--max-len", max_len), ("--ctx", ctx)):
        if value is not None and value < 1:
            raise StillgraphError(STAGE, f"{name} {value} is not a number of tokens", "use 1 or more")
    if ctx is not None and max_len > ctx:
        raise StillgraphError(
            STAGE, f"--max-len {max_len} is over --ctx {ctx}", "lower --max-len or raise --ctx"
        )
    return GraphShape(role="prefill", batch=config.batch, slots=max_len, ctx=ctx)


def decode_shape(config: ExportConfig, ctx: int) -> GraphShape:
    """A decode over `ctx` cache slots. Raises StillgraphError."""
    if ctx < 2:
        raise StillgraphError(STAGE, f"--ctx {ctx} leaves no room for a next token", "use 2 or more")
    return GraphShape(role="decode", batch=config.batch, slots=1, ctx=ctx)


def check_positions(spec: ModelSpec, shape: GraphShape) -> None:
    """Refuse a graph whose positions the model was not made for. Raises StillgraphError."""
    if shape.capacity > spec.max_position_embeddings:
        option = "--ctx" if shape.ctx else "--max-len"
        problem = f"{option} {shape.capacity} is over the model's max_position_embeddings"
        problem += f" of {spec.max_position_embeddings}"
        raise StillgraphError(STAGE, problem, f"lower {option}")


def check_fits_bundle(
    config: ExportConfig, checkpoint_sha256: str, shape: GraphShape, former: Manifest
) -> None:
    """Refuse to put graphs of two checkpoints, targets, precisions or shapes into one bundle."""
    pairs: dict[str, tuple[object, object]] = {
        "checkpoint": (checkpoint_sha256[:12], former.source.checkpoint_sha256[:12]),
        "target": (config.target, former.target),
        "precision": (config.precision, former.precision),
    }
    for entry in former.graphs.values():
        if entry.shape.role != shape.role:
            pairs["batch"] = (shape.batch, entry.shape.batch)
            if shape.ctx is not None and entry.shape.ctx is not None:
                pairs["ctx"] = (shape.ctx, entry.shape.ctx)
            elif shape.capacity > entry.shape.capacity and shape.role == "prefill":
                pairs["max_len at most ctx"] = (shape.capacity, entry.shape.capacity)
    for name, (new, old) in pairs.items():
        if new != old:
            problem = f"{config.place} holds a bundle with {name} {old}, and this export has {new}"
            raise StillgraphError(
                STAGE, problem, "give another --out, or replace it with 'stillgraph export bundle'"
            )
