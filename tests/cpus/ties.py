"""Whether two continuations part at a near tie: where the bundle itself hardly prefers the one token."""

from __future__ import annotations

from dataclasses import dataclass

from stillgraph.engine import Engine

# Of the largest logit. fp32: what validation allows sums in another order. Else half a step of activations
# that are rounded to 8 bits: kernels do that by block, by row or not at all.
NEAR = {"fp32": 1e-5, "int8": 1 / 254, "int4": 1 / 254}


@dataclass(frozen=True)
class Parting:
    """index: of the first token that differs; gap: of its logit and the other's, relative to the largest."""

    index: int
    gap: float


def part(engine: Engine, prompt: list[int], ours: list[int], theirs: list[int]) -> Parting | None:
    """Where tokens part from those that this engine gives, or None where they are equal."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), None)
    if index is None:
        return None if len(ours) == len(theirs) else Parting(min(len(ours), len(theirs)), float("inf"))
    engine.reset()
    logits = engine.graphs.prefill([prompt])[0]
    for token in ours[:index]:
        logits = engine.graphs.decode([token])[0]
    gap = logits[ours[index]] - logits[theirs[index]]
    return Parting(index, float(gap / abs(logits).max()))
