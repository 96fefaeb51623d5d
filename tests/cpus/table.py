"""`make cpus`: product forms and the demo on each class of CPU, as a table, printed and in README.md.

    python -m tests.cpus.table FOLDER

FOLDER keeps the Arm root for the next time. Exit code 1 when a form is inexact, a class is not what it says,
or tokens part where they should not; a class that cannot be tried is a row that says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime as ort

from stillgraph import load
from tests.cpus import cases, cores, trial
from tests.cpus.arm import Arm, Missing
from tests.cpus.cases import BUNDLES
from tests.cpus.lanes import LANES
from tests.cpus.probe import Found, Product
from tests.cpus.trial import Trial
from tests.page import keep

PAGE = Path(__file__).with_name("README.md")
START, END = "<!-- make cpus -->\n", "<!-- end -->\n"
NAMES = ", ".join(bundle.name for bundle in BUNDLES)
HEAD = (
    "CPU class", "run as", "integers multiplied by", "forms exact", "full-range codes",
    "activations rounded, int8; int4", f"tokens as fp32's: {NAMES}", f"as the native class's: {NAMES}",
    "seconds",
)  # fmt: skip


def main(folder: Path) -> int:
    cases.write(folder / "cases")
    trials = _trials(folder)
    text = render(trials)
    keep(PAGE, START, END, text)
    print(text)
    return int(any(tried.problems for tried in trials))


def _trials(folder: Path) -> list[Trial]:
    """Natively first, which the others are compared with; then all others, one for each core at a time."""
    given = folder / "cases"
    native = trial.run(None, given)
    arm = _arm(folder / "arm")
    with cores.pool() as pool:
        others = list(pool.map(lambda lane: trial.run(lane, given, arm), LANES.values()))
    if native.found is None:
        return [native, *others]
    engines = {bundle.name: load(given / "bundles" / bundle.name, compiled=False) for bundle in BUNDLES}
    prompts = json.loads((given / "prompts.json").read_text(encoding="ascii"))
    return [trial.against(tried, native.found, engines, prompts) for tried in (native, *others)]


def _arm(folder: Path) -> Arm | Missing:
    try:
        return Arm(folder)
    except Missing as missing:
        return missing


def render(trials: list[Trial]) -> str:
    """The table, and under it what is wrong, and what differs and may."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD)), *map(_row, trials)]
    problems = [f"- WRONG, {tried.title}: {problem}" for tried in trials for problem in tried.problems]
    notes = [f"- {tried.title}: {note}" for tried in trials for note in _notes(tried)]
    made = f"ONNX Runtime {ort.__version__}."
    return "\n".join([*lines, "", made, *([""] if problems or notes else []), *problems, *notes]) + "\n"


def _row(tried: Trial) -> str:
    start = [tried.title, tried.how, tried.kernel]
    if tried.found is None:
        why = f"NOT TRIED: {tried.why_not}" if tried.why_not else "FAILED"
        return _line([*start, why, *[""] * (len(HEAD) - len(start) - 1)])
    found, prompts = tried.found, len(tried.found.tokens["fp32"])
    exact = sum(map(_is_exact, found.products.values()))
    parted = tried.partings or {}
    native = [prompts - len(parted.get(bundle.name, ())) for bundle in BUNDLES]
    return _line(
        [
            *start,
            f"{exact} of {len(found.products)}",
            "exact" if found.full_range else "NOT exact",
            f"{found.rounding['int8']}; {found.rounding['int4']}",
            f"{', '.join(map(str, _as_fp32(found)))} of {prompts}",
            f"{', '.join(map(str, native))} of {prompts}",
            f"{tried.seconds:.0f}",
        ]
    )


def _as_fp32(found: Found) -> list[int]:
    fp32 = found.tokens["fp32"]
    rows = [zip(found.tokens[bundle.name], fp32, strict=True) for bundle in BUNDLES]
    return [sum(one == other for one, other in pairs) for pairs in rows]


def _is_exact(product: Product) -> bool:
    return product.exact == product.sizes


def _notes(tried: Trial) -> list[str]:
    """What is not equal and not wrong either."""
    notes = []
    for name, partings in (tried.partings or {}).items():
        if partings:
            gap = max(parting.gap for parting in partings)
            where = f"{len(partings)} of the prompts part from the native class's tokens at near ties"
            notes.append(f"{name}: {where}, two logits {gap:.1e} of the largest apart or less")
    return notes


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
