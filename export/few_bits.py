"""How weights of few bits are stored: what a command line says of it, and what it leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stillgraph.errors import StillgraphError
from stillgraph.exporter.calibration import NONE, calibration_of
from stillgraph.exporter.precisions import CALIBRATED, PRECISIONS, QUANTIZED
from stillgraph.manifest import Precision, Quantization

STAGE = "export"
BLOCK_SIZES = (32, 64, 128)
# Where none is given. Before its channels were smoothed a real model at int8 had a KL of 0.017 nats in blocks
# of 128, 0.010 in those of 64 and 0.006 in those of 32, most of it from activations, which are rounded in the
# same blocks; TPOT is 1.05 of 128's, TTFT 1.22.
BLOCK_SIZE: dict[Precision, int] = {"int8": 32, "int4": 64}
SCALE_BITS = 32
BUDGET = 6.4  # bits a weight: with its head a token then reads as much as of what others call four bits
REFINE = 1024  # tokens that get a score of eight bits
HEAD = "lm_head"
TABLES = ("embed_tokens", HEAD)  # what int4 keeps at int8: a mistake there is in every token


def few_bits(
    precision: Precision,
    block_size: int | None,
    asymmetric: bool | None,
    keep: Sequence[str],
    calibrate: str,
    budget: float | None,
    kl: float | None = None,
) -> Quantization:
    """The quantization of command-line values. Raises StillgraphError for values that do not go together.

    What is None is chosen: `BLOCK_SIZE`, at int4 zero points, and where it is calibrated a budget. A head of
    int4 scores by four of its eight bits first, unless a precision is given for it.
    """
    size = BLOCK_SIZE[precision] if block_size is None else block_size
    if size not in BLOCK_SIZES:
        sizes = " or ".join(map(str, BLOCK_SIZES))
        raise StillgraphError(STAGE, f"--block-size {size} is not supported", f"use {sizes}")
    four = precision == CALIBRATED
    asked = all_kept(keep)
    tables = {name: "int8" for name in TABLES if name not in asked} if four else {}
    text = calibration_of(calibrate)  # refused here, though eight bits only have their channels evened by it
    calibration = text if four else None
    symmetric = not (four if asymmetric is None else asymmetric)
    return Quantization(
        block_size=size,
        symmetric=symmetric,
        keep=tables | asked,
        calibration=calibration,
        budget=_budget(budget, kl, precision, calibration, size, symmetric),
        kl=kl,
        refine=REFINE if four and HEAD not in asked else 0,
    )


def _budget(
    budget: float | None,
    kl: float | None,
    precision: Precision,
    calibration: str | None,
    size: int,
    symmetric: bool,
) -> float | None:
    given = [f"--{name} {value:g}" for name, value in (("budget", budget), ("kl", kl)) if value is not None]
    if given and calibration is None:
        how = f"--calibrate {NONE}" if precision == CALIBRATED else f"--precision {precision}"
        problem = f"{given[0]} is given to what a calibration finds to matter, and {how} has none"
        raise StillgraphError(STAGE, problem, "leave one of them out")
    if len(given) > 1:
        problem = f"{given[0]} and {given[1]} both say how many weights get eight bits"
        raise StillgraphError(STAGE, problem, "leave one of them out")
    if kl is not None and not 0 <= kl < math.inf:
        problem = f"--kl {kl:g} is no divergence in nats"
        raise StillgraphError(STAGE, problem, "give for example --kl 0.05")
    if budget is not None:
        _check_bits(budget, size, symmetric)
    return BUDGET if calibration and not given else budget


def _check_bits(budget: float, size: int, symmetric: bool) -> None:
    least, most = PRECISIONS["int4"].bits, PRECISIONS["int8"].bits
    assert least is not None
    assert most is not None
    taken = block_bits(least, size, symmetric) / size
    if least <= budget < taken:
        form = f"blocks of {size} with scales" + ("" if symmetric else " and zero points")
        problem = f"--budget {budget:g} is under the {taken:.4g} bits that {form} take"
        raise StillgraphError(STAGE, problem, "give more, larger blocks or --symmetric")
    if not least <= budget <= most + 1:
        problem = f"--budget {budget:g} is no number of bits between {least} and {most + 1}"
        raise StillgraphError(STAGE, problem, f"give for example --budget {BUDGET}")


def block_bits(bits: int, size: int, symmetric: bool) -> int:
    """Of a block's codes, its scale, and its zero point where it has one."""
    return size * bits + SCALE_BITS + (0 if symmetric else bits)


def all_kept(options: Sequence[str]) -> dict[str, Precision]:
    """Precision by pattern. Raises StillgraphError for a pattern that is given two."""
    found: dict[str, Precision] = {}
    for pattern, precision in map(kept, options):
        if found.setdefault(pattern, precision) != precision:
            problem = f"--keep {pattern} is given as {found[pattern]} and as {precision}"
            raise StillgraphError(STAGE, problem, "give one of them")
    return found


def kept(option: str) -> tuple[str, Precision]:
    """A pattern of weight names and the precision it keeps, of PATTERN=PRECISION. Raises StillgraphError."""
    pattern, _, precision = option.partition("=")
    known = ("fp32", *QUANTIZED)
    if not pattern or precision not in known:
        problem = f"--keep {option!r} is not PATTERN=PRECISION with a precision of {' or '.join(known)}"
        raise StillgraphError(STAGE, problem, "write for example --keep lm_head=int8")
    return pattern, precision
