"""Choosing the next token: transformers' logits processors as small closures, in the order it runs them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias

import numpy as np

from stillgraph.errors import StillgraphError

if TYPE_CHECKING:  # options are checked before ONNX Runtime is imported
    from stillgraph.session import Array

# (scores [V], ids so far) -> scores [V], a new array
Processor: TypeAlias = "Callable[[Array, Sequence[int]], Array]"
COLDEST = 1e-30  # a temperature that still divides any logit without overflow; 1e-8 is as good as greedy
# (logits [V], ids so far) -> (the next token, its log-probability)
Choose: TypeAlias = "Callable[[Array, Sequence[int]], tuple[int, float]]"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy: top_k, top_p and min_p then do nothing.

    Raises StillgraphError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda value: 0 <= value < math.inf, "0 (greedy) or more")
        if self.top_k is not None and not is_count(self.top_k, 1):
            _refuse("top_k", self.top_k, "1 or more")
        if self.top_p is not None:
            _check("top_p", self.top_p, lambda value: 0 < value <= 1, "over 0 and at most 1")
        if self.min_p is not None:
            _check("min_p", self.min_p, lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.repetition_penalty is not None:
            allowed = "1e-6 to 1e6 (1 changes nothing)"
            _check("repetition_penalty", self.repetition_penalty, lambda value: 1e-6 <= value <= 1e6, allowed)
        if self.seed is not None and not is_count(self.seed, 0):
            _refuse("seed", self.seed, "0 or more")

    def processors(self) -> list[Processor]:
        """The changes to the scores, in the order of transformers' `_get_logits_processor`."""
        chain: list[Processor] = []
        if self.repetition_penalty not in (None, 1.0):
            chain.append(repetition_penalty(self.repetition_penalty))
        if self.temperature == 0:
            return chain
        if self.temperature != 1.0:
            chain.append(temperature(self.temperature))
        if self.top_k is not None:
            chain.append(top_k(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            chain.append(top_p(self.top_p))
        if self.min_p:
            chain.append(min_p(self.min_p))
        return chain


class Sampler:
    """Chooses the tokens of one row. The same seed and row choose the same tokens."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._processors = sampling.processors()
        self._greedy = sampling.temperature == 0
        self._random = np.random.default_rng(None if sampling.seed is None else (sampling.seed, row))
        self._scratch: Array | None = None

    def __call__(self, logits: Array, ids: Sequence[int]) -> tuple[int, float]:
        """(token, its log-probability under the raw logits) from logits [V], not changed, and the ids."""
        scores = logits
        for process in self._processors:
            scores = process(scores, ids)
        token = int(scores.argmax()) if self._greedy else self._draw(scores)
        return token, self._logprob(logits, token)

    def _draw(self, scores: Array) -> int:
        kept = np.flatnonzero(scores > -np.inf)
        weights = np.exp(scores[kept].astype(np.float64) - scores.max())
        cumulative = weights.cumsum()
        return int(kept[cumulative.searchsorted(self._random.random() * cumulative[-1], side="right")])

    def _logprob(self, logits: Array, token: int) -> float:
        if self._scratch is None:
            self._scratch = np.empty_like(logits)
        return float(logits[token]) - log_normalizer(logits, self._scratch)


class Forced:
    """Takes given tokens, then the likeliest ones. `logits` [V] is a copy of what it was last asked with."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, logits: Array, ids: Sequence[int]) -> tuple[int, float]:
        """As `Sampler`."""
        self.logits = logits.copy()
        token = next(self._tokens, None)
        token = int(logits.argmax()) if token is None else token
        return token, float(logits[token]) - log_normalizer(logits)


def log_normalizer(logits: Array, scratch: Array | None = None) -> float:
    """log(sum(exp(logits))), which a logit less this is a log-probability: 0.15 ms for 262144 logits.

    The exponents are less the largest logit and none overflows. scratch: an array like `logits` to write to.
    """
    top = logits.max()
    scratch = np.subtract(logits, top, out=scratch)
    np.exp(scratch, out=scratch)
    return float(top) + math.log(float(scratch.sum(dtype=np.float64)))


def likeliest(logits: Array, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens of logits [V] and their log-probabilities, the likeliest first."""
    count = min(count, logits.size)
    if count == 0:
        return []
    found = np.argpartition(logits, -count)[-count:]
    found = found[np.lexsort((found, -logits[found]))]
    normalizer = log_normalizer(logits)
    return [(int(token), float(logits[token]) - normalizer) for token in found]


def repetition_penalty(penalty: float | None) -> Processor:
    """Makes the ids so far less likely where the penalty is over 1 (RepetitionPenaltyLogitsProcessor)."""

    def process(scores: Array, ids: Sequence[int]) -> Array:
        scores, seen = scores.copy(), np.asarray(ids)
        values = scores[seen]
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        return scores

    return process


def temperature(value: float) -> Processor:
    """TemperatureLogitsWarper."""
    value = max(value, COLDEST)
    return lambda scores, _: scores / value


def top_k(count: int) -> Processor:
    """Keeps the `count` highest scores and all that equal the last of them (TopKLogitsWarper)."""

    def process(scores: Array, _: Sequence[int]) -> Array:
        at = max(0, scores.size - count)
        return np.where(scores < np.partition(scores, at)[at], -np.inf, scores)

    return process


def top_p(mass: float) -> Processor:
    """Keeps the fewest highest scores whose probability reaches `mass` (TopPLogitsWarper)."""

    def process(scores: Array, _: Sequence[int]) -> Array:
        kept = np.flatnonzero(scores > -np.inf)  # sorting only these is what makes top_k first cheap
        order = kept[scores[kept].argsort()]
        removed = _softmax(scores[order]).cumsum() <= 1 - mass
        removed[-1] = False
        scores = scores.copy()
        scores[order[removed]] = -np.inf
        return scores

    return process


def min_p(share: float) -> Processor:
    """Drops what is less likely than `share` of the most likely (MinPLogitsWarper)."""

    def process(scores: Array, _: Sequence[int]) -> Array:
        likely = _softmax(scores)
        return np.where(likely < likely.max() * share, -np.inf, scores)

    return process


def _softmax(scores: Array) -> Array:
    weights: Array = np.exp(scores - scores.max())
    weights /= weights.sum()
    return weights


def is_count(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _check(name: str, value: float, ok: Callable[[float], bool], allowed: str) -> None:
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) and ok(float(value))):
        _refuse(name, value, allowed)


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise StillgraphError("read sampling options", f"{name} is {value!r}", f"give a {name} of {allowed}")
