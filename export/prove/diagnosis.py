"""What is wrong with a decoder, in sentences: where its logits first differ, and what that looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from stillgraph.exporter.prove.certify import found_of
from stillgraph.exporter.validate.dynamic_replay import TWO_CALLS
from stillgraph.exporter.validate.metrics import Comparison
from stillgraph.exporter.validate.report import CaseResult, Parity
from stillgraph.spec import ModelSpec

FAR = 10.0  # times the median
IsWithoutWindows = Callable[[CaseResult], bool]


@dataclass(frozen=True)
class Spot:
    """Logits at one position of a case, and whether they are wrong."""

    case: CaseResult
    comparison: Comparison
    wrong: bool

    @property
    def position(self) -> int:
        return self.comparison.position

    @property
    def continues(self) -> bool:
        """Whether they are of a call that continues a cache."""
        return self.position >= self.case.prompt or TWO_CALLS in self.case.given

    def __str__(self) -> str:
        error = self.comparison.relative_error
        return f"by {error:.1e} of the largest logit at position {self.position} ({self.case.title})"


def diagnose(parity: Parity, spec: ModelSpec, is_without_windows: IsWithoutWindows) -> list[str]:
    """What a validation of a growing decoder found, the pattern first.

    is_without_windows: whether a case is what the model gives without its sliding windows; asked only where
    it looks like that.
    """
    spots = [spot for case in parity.cases for spot in _spots(case, parity)]
    wrong = [spot for spot in spots if spot.wrong]
    said = [_pattern(spots, wrong, spec, is_without_windows)] if wrong else []
    return [*said, *_first_layer(parity), *found_of(parity)]


def _pattern(
    spots: list[Spot], wrong: list[Spot], spec: ModelSpec, is_without_windows: IsWithoutWindows
) -> str:
    """The narrowest description that fits all that is wrong."""
    right = [spot for spot in spots if not spot.wrong]
    first = min(wrong, key=lambda spot: (spot.position, spot.case.prompt))
    worst = max(wrong, key=lambda spot: spot.comparison.relative_error)
    before = [spot.position for spot in right if spot.position < first.position]
    for window in spec.windows:
        if first.position >= window > max(before, default=window):
            said = f"Past the window of {window} its logits differ from the reference {first}"
            if is_without_windows(first.case):
                return (
                    f"{said}: the sliding window is not in the graph, which gives what full attention gives."
                )
            return f"{said}; up to there they are right."
    if all(spot.case.optimized for spot in wrong) and any(not spot.case.optimized for spot in right):
        return (
            f"As the graph is written its logits are right, and with ONNX Runtime's optimizations on they"
            f" differ, first {first}: by what rounds there, or by a kernel."
        )
    if all(TWO_CALLS in spot.case.given for spot in wrong):
        return f"Prompts given at once are right, and prompts given in two calls differ, first {first}."
    if all(spot.continues for spot in wrong) and any(not spot.continues for spot in right):
        return (
            f"Prompts given at once are right, and what continues a cache differs, first {first}: positions,"
            " mask or keys of calls after the first are wrong."
        )
    if not before:
        return f"Logits differ from the first token on, {first}, and most {worst}."
    return f"Logits differ first {first}, and most {worst}."


def _first_layer(parity: Parity) -> Iterator[str]:
    """Where in the model what is wrong begins: the lowest layer with wrong keys or values."""
    found = [(check.layer, case.prompt, check) for case in parity.cases for check in case.checks
             if check.layer is not None and not check.holds]  # fmt: skip
    if not found:
        return
    layer, _, check = min(found, key=lambda one: one[:2])
    below = f"right below layer {layer}" if layer else "wrong in the first layer"
    yield f"Keys and values are {below}: {check}."


def _spots(case: CaseResult, parity: Parity) -> list[Spot]:
    """Every comparison of a case, held to the bound of the case.

    A graph that rounds has none of single logits: those of a case that breaks one are wrong where they
    diverge far more than in cases that hold.
    """
    worst = [check.bound for check in case.checks if (check.what, check.measure) == ("logits", "worst")]
    if worst:
        return [Spot(case, c, not c.relative_error <= worst[0]) for c in case.comparisons]
    kl = next(c.bound for whole in parity.agreements for c in whole.checks if c.measure == "mean KL")
    right = [c.kl for other in parity.cases if parity.within_bound(other) for c in other.comparisons]
    if right and not parity.within_bound(case):
        kl = min(kl, FAR * median(right))
    return [Spot(case, c, not c.kl <= kl) for c in case.comparisons]
