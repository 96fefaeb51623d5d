"""How weights of each precision are stored and what they may cost: the one place that tells them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillgraph.manifest import Precision

Bits = Literal[4, 8]
HALF_ROUNDOFF = 2.0**-11  # of fp16
ACTIVATION_ROUNDOFF = 2.0**-8  # of int8, to the largest value of a block


@dataclass(frozen=True)
class PrecisionTraits:
    """Storage and bounds of a precision.

    bits: of an integer code, None where weights are numbers as they are; roundoff: of the inputs of
    products, relative, None where nothing is rounded. What codes may cost a model, on a text: max_kl, mean KL
    divergence in nats from the checkpoint's own logits, and max_perplexity, as a multiple of its; fast_kl,
    what rounding the inputs of a fast prefill may, by what is foretold.
    """

    bits: Bits | None = None
    roundoff: float | None = None
    max_kl: float = 0.0
    max_perplexity: float = 1.0
    fast_kl: float = 0.0


# What codes may cost: the demo loses 1.6e-5 nats at int8 and 1.3e-3 at int4; the 1B geometry with random
# weights, the hardest to round, loses 6.6e-2 at int4. A weight in a wrong place costs whole nats.
PRECISIONS: dict[Precision, PrecisionTraits] = {
    "fp32": PrecisionTraits(),
    "fp16": PrecisionTraits(roundoff=HALF_ROUNDOFF),
    "int8": PrecisionTraits(
        bits=8, roundoff=ACTIVATION_ROUNDOFF, max_kl=0.02, max_perplexity=1.02, fast_kl=0.01
    ),
    "int4": PrecisionTraits(
        bits=4, roundoff=ACTIVATION_ROUNDOFF, max_kl=0.25, max_perplexity=1.25, fast_kl=0.02
    ),
}
CALIBRATED: Precision = "int4"  # the one that is rounded for a text
QUANTIZED = tuple(name for name, traits in PRECISIONS.items() if traits.bits)
