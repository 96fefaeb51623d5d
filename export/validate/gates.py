"""What errors may be: those of graphs in fp32, of graphs in fp16, and of products that round their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from stillgraph.exporter.precisions import ACTIVATION_ROUNDOFF, HALF_ROUNDOFF, PRECISIONS
from stillgraph.exporter.validate.measures import Measured, What
from stillgraph.manifest import Precision
from stillgraph.spec import Frozen, ModelSpec

# Times PyTorch's own error in fp32, at the same places or in all of the text. Seen on SmolLM2-135M, 30 layers
# and 1024 positions: RMS 0.65 to 0.88, the worst 0.39 to 2.5, since one slot out of thousands is luck.
RMS_RATIO = 2.0
WORST_RATIO = 8.0
FLOOR = 2.0**-22  # four roundoffs of fp32: PyTorch's own error may be 0 where a sum has few terms
# Of products whose inputs are rounded, over all positions of a plan. Mean KL in nats: tiny models and the
# demo have 5e-4 at most, SmolLM2-135M 0.011 (int8), 0.043 (int4) and 0.088 (an int8 prefill). Other best
# tokens: up to 16 % of the tiny models' nearly equal logits, 9 of SmolLM2-135M's 26 after random ids (int4).
ROUNDED_KL = 0.2
ROUNDED_MISSES = 0.3

Measure = Literal["worst", "RMS", "mean KL", "top-1 misses", "magnitude"]


class Check(Frozen):
    """One error and what it may be. layer, row, position: where it is largest; None where it has no place.

    value: of `worst`, the largest difference over the largest magnitude; of `RMS`, the root mean square of
    differences over that of magnitudes; of `mean KL`, nats; of `top-1 misses`, a share of positions; of
    `magnitude`, the largest in the inputs and results of a module's products.
    """

    what: What
    measure: Measure
    value: float
    bound: float
    layer: int | None = None
    row: int | None = None
    position: int | None = None

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # which NaN is not

    @property
    def ratio(self) -> float:
        """The error over its bound; infinite where it is no number."""
        if self.bound == 0:
            return 0.0 if self.value == 0 else math.inf
        return math.inf if math.isnan(self.value) else self.value / self.bound

    def __str__(self) -> str:
        if self.measure == "magnitude":
            where = "" if self.layer is None else f" of layer {self.layer}"
            return f"a magnitude of {self.value:.3g} of fp16 {self.what}{where}"
        names = {"mean KL": "mean KL divergence", "top-1 misses": "share of other best tokens"}
        name = names.get(self.measure, "relative error")
        kind = " (RMS)" if self.measure == "RMS" else ""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        place = "" if self.position is None else f" at position {self.position}"
        return f"a {name} of {self.value:.2e}{kind} of {self.what}{layer}{place}"


class Gate(Frozen):
    """The bounds of one kind of graph.

    kind: `own`, multiples of PyTorch's own error in fp32; `worst`, `value` for every worst error; `rounded`,
    `value` for every RMS of keys, values and features, `kl` and `misses` for the logits of a whole plan.
    """

    kind: Literal["own", "worst", "rounded"]
    value: float = 0.0
    kl: float = 0.0
    misses: float = 0.0

    def checks(self, measured: Iterable[Measured]) -> tuple[Check, ...]:
        """All that are broken, and of each kind the one nearest to its bound; worst first."""
        found = [check for one in measured for check in self._checks(one)]
        nearest = {(c.what, c.measure): c for c in sorted(found, key=lambda check: check.ratio)}
        kept = [c for c in found if not c.holds or c is nearest[c.what, c.measure]]
        return tuple(sorted(kept, key=lambda check: -check.ratio))

    def logits(self, kl: float, misses: float, positions: int) -> tuple[Check, ...]:
        """Of `rounded`: the mean KL divergence of some positions, and the share with another best token.

        That of few positions may be two standard deviations larger.
        """
        most = self.misses + 2 * math.sqrt(self.misses * (1 - self.misses) / positions)
        return (
            Check(what="logits", measure="mean KL", value=kl, bound=self.kl),
            Check(what="logits", measure="top-1 misses", value=misses, bound=most),
        )

    def _checks(self, one: Measured) -> list[Check]:
        rms, worst = one.error.over(one.truth)
        if self.kind == "worst":
            return [_check(one, "worst", worst, self.value)]
        if self.kind == "rounded":
            return [] if one.what == "logits" else [_check(one, "RMS", rms, self.value)]
        assert one.own is not None
        own_rms, own_worst = one.own
        return [
            _check(one, "RMS", rms, max(FLOOR, RMS_RATIO * own_rms)),
            _check(one, "worst", worst, max(FLOOR, WORST_RATIO * own_worst)),
        ]


def _check(one: Measured, measure: Measure, value: float, bound: float) -> Check:
    """With the place where the error is largest; a picture's features have none in the text."""
    at = int((one.error.largest if measure == "worst" else one.error.squares).argmax())  # NaN is the largest
    place = {} if one.what == "features" else {"row": int(one.rows[at]), "position": int(one.positions[at])}
    return Check(what=one.what, measure=measure, layer=one.layer, value=value, bound=bound, **place)


def gate(spec: ModelSpec, precision: Precision, rounds: bool = True) -> Gate:
    """What holds for a graph of this precision.

    rounds: whether the inputs of its products are rounded to 8 bits, where weights are of int8 or int4.
    """
    if PRECISIONS[precision].bits and rounds:
        return Gate(kind="rounded", value=rounded_bound(spec), kl=ROUNDED_KL, misses=ROUNDED_MISSES)
    if precision == "fp16":
        return Gate(kind="worst", value=half_bound(spec))
    return Gate(kind="own")


def half_bound(spec: ModelSpec) -> float:
    """Each of a layer's 7 products rounds its input, its matrix and its result to fp16.

    Independent errors add as the root of their number; the largest of V errors has the same ratio to the
    largest of V logits as one error to one logit. 2 is the margin.
    """
    return 2 * HALF_ROUNDOFF * math.sqrt(21 * len(spec.layers))


def rounded_bound(spec: ModelSpec) -> float:
    """The kernels round the input of each of 4 products a layer, and of the head, to 8 bits.

    Errors add as above. 12 is the margin, since those of the first layers go through all others and a massive
    activation leaves the rest of its vector few of the 8 bits: of 2^-8 sqrt(4 layers + 1) tiny models have
    2.4, the demo 1.7 and SmolLM2-135M's int8 prefill 7.9 (0.34, a prompt of 2); a tiny model with a wrong
    window has 37 and more. Zeros for values would be 1, so more than 0.6 is never right.
    """
    return min(0.6, 12 * ACTIVATION_ROUNDOFF * math.sqrt(4 * len(spec.layers) + 1))


def why(spec: ModelSpec, precision: Precision) -> str:
    """The bounds in a sentence or two."""
    own = (
        f"bounds against PyTorch in float64: {RMS_RATIO:g} times the RMS and {WORST_RATIO:g} times the worst"
        " error of PyTorch's own fp32 there or in the whole text, and at least 2^-22"
    )
    if PRECISIONS[precision].bits:
        return (
            f"bounds of inputs rounded to 8 bits: mean KL {ROUNDED_KL:g} nats, {ROUNDED_MISSES:.0%} of top-1"
            f" missed, RMS of keys and values {rounded_bound(spec):.1e} (12 * 2^-8 * sqrt(4 products *"
            f" {len(spec.layers)} layers + head), at most 0.6); with optimizations off they are not"
            f" rounded: {own}"
        )
    if precision == "fp16":
        return (
            f"bound {half_bound(spec):.1e} of the largest: 2 * 2^-11 * sqrt(3 roundings * 7 products *"
            f" {len(spec.layers)} layers)"
        )
    return own
