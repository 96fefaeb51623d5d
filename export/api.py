"""`stillgraph.export`, and what it shares with `stillgraph export bundle`.

torch and onnx are imported inside the functions: wrong use is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exit_codes import not_installed
from stillgraph.exporter.calibration import SAMPLES
from stillgraph.exporter.checkpoint_folder import check_folder
from stillgraph.exporter.config import (
    ExportConfig,
    Say,
    decode_shape,
    prefill_shape,
    request,
    with_one_slack,
)
from stillgraph.exporter.staging import check_place
from stillgraph.exporter.texts.passages import read_texts
from stillgraph.manifest import Manifest, Precision, Target, read

if TYPE_CHECKING:
    from stillgraph.exporter.validate.report import Parity


def export(
    model: str | Path = "demo",
    out: str | Path | None = None,
    *,
    max_len: int = 128,
    ctx: int = 1024,
    target: Target = "portable",
    precision: Precision = "fp32",
    block_size: int | None = None,
    asymmetric: bool | None = None,
    keep: Sequence[str] = (),
    fast_prefill: bool = False,
    calibrate: str | Path = SAMPLES,
    budget: float | None = None,
    kl: float | None = None,
    batch: int = 1,
    validate: bool = True,
    text: Sequence[str | Path] = (),
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Make a new bundle of all graphs over one weights file, validate it quickly, and return its folder.

    The options are those of `stillgraph export bundle`, and the prefill continues a cache of `ctx` slots.
    model: a hub id, a checkpoint folder or a GGUF file; out: the bundle's folder, by default
    artifacts/<model>; max_len: tokens that the prefill takes at once; block_size: 32, 64 or 128, by default
    64 with int4 and 32 with int8; asymmetric: zero points, by default with int4; keep: PATTERN=PRECISION,
    weights kept otherwise; calibrate: what few bits are made for: a text file, `samples` of the model's own,
    or `none`; budget: bits a weight of int4, by default 6.4 where it is calibrated, or kl: nats that its four
    bits may cost; validate: compare with PyTorch, which takes most memory; text: files that its statistics
    are made over, by default texts that ship; progress: called with what is being done, in a few words.

    Raises StillgraphError for wrong use and bad input, and for what is not installed; then the previous
    bundle is as it was. Raises CheckFailed, a StillgraphError, where a graph fails its checks, or where the
    new bundle breaks a bound of its validation: its reports/parity.html says which.
    """
    config = request(
        model=str(model),
        target=target,
        precision=precision,
        block_size=block_size,
        asymmetric=asymmetric,
        keep=(keep,) if isinstance(keep, str) else keep,
        fast_prefill=fast_prefill,
        calibrate=str(calibrate),
        budget=budget,
        kl=kl,
        batch=batch,
        out=None if out is None else Path(out),
    )
    texts = [Path(path) for path in ((text,) if isinstance(text, str | Path) else text)]
    say = progress or (lambda _: None)
    try:
        _, parity = make(config, max_len, ctx, validated=validate, texts=texts, say=say)
    except ModuleNotFoundError as error:
        if told := not_installed(error, "stillgraph export"):
            raise told from error
        raise
    if parity is not None:
        require_passed(config.place, parity)
    return config.place


def make(
    config: ExportConfig, max_len: int, ctx: int, *, validated: bool, texts: Sequence[Path], say: Say
) -> tuple[Manifest, Parity | None]:
    """A new bundle at `config.place`, and its quick validation over texts where that is asked for.

    A broken bound is a report that says so: `require_passed` raises for it.
    """
    shapes = with_one_slack([prefill_shape(config, max_len, ctx), decode_shape(config, ctx)])
    check_paths(config)
    if texts and not validated:
        problem = "--text does nothing with --no-validate"
        raise StillgraphError("export", problem, "leave one of them out")
    read_texts(texts)  # before any work
    from stillgraph.exporter.bundle.build import export as build
    from stillgraph.exporter.validate.validate import validate as prove

    manifest = build(config, shapes, replace=True, say=say, vision=None)
    if not validated:
        return manifest, None
    parity = prove(config.place, model=config.model, depth="quick", texts=texts, say=say)
    return read(config.place), parity  # which lists golden.json now


def check_paths(config: ExportConfig) -> None:
    """Raises StillgraphError for a checkpoint or a place that cannot be one, before torch is imported."""
    check_folder(config.model)
    check_place(config.place)


def require_passed(bundle: Path, parity: Parity) -> None:
    """Raises CheckFailed where a validation broke a bound."""
    if problem := parity.problem():
        raise CheckFailed("validate", problem, f"see {bundle / 'reports' / 'parity.html'}")
