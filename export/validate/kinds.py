"""What a deployer asks of each kind of graph in a bundle: how far it is from the checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from stillgraph.exporter.trace.half_range import LIMIT
from stillgraph.exporter.validate.divergences import Statistics
from stillgraph.exporter.validate.gates import Check
from stillgraph.manifest import Precision
from stillgraph.spec import Frozen


class TextStatistics(Frozen):
    """Over one text, as the graphs run it: the first half of each chunk is the prompt, and the positions of
    the second half that have a next token are counted.

    text: the name of its file, None of random ids; sha256: of the text; chunk: tokens of one.
    """

    text: str | None
    sha256: str
    chunk: int
    chunks: int
    statistics: Statistics


class LayerNoise(Frozen):
    """10 log10 of signal power over noise power, dB, of a layer's keys and of its values over all texts.

    Infinite where they are PyTorch's to the bit.
    """

    layer: int
    keys: float
    values: float

    @property
    def worst(self) -> float:
        return min(self.keys, self.values)


class FirstDifferences(Frozen):
    """Greedy continuations of passages of the texts, by the graphs and by PyTorch.

    prompt, tokens: of each, given and at most continued; first: by prompt, the first token that is another,
    counted from 0, None where all are equal.
    """

    prompt: int
    tokens: int
    first: tuple[int | None, ...]

    @property
    def equal(self) -> int:
        """Prompts whose continuation is the same to its end."""
        return sum(found is None for found in self.first)

    @property
    def median(self) -> float:
        """Of the first different token; of an equal continuation, its length."""
        return float(median(self.tokens if found is None else found for found in self.first))

    def histogram(self, bins: int = 4) -> list[tuple[int, int, int]]:
        """(first, last, prompts) of equal ranges of the first different token; equal ones are in none."""
        edges = [self.tokens * index // bins for index in range(bins + 1)]
        ranges = [(low, high - 1) for low, high in pairwise(edges) if high > low]
        found = [value for value in self.first if value is not None]
        return [(low, high, sum(low <= value <= high for value in found)) for low, high in ranges]


class Kind(Frozen):
    """One kind of graphs in a bundle: with the prefill of its weights, or the one of int8 activations.

    worst_error: the largest relative error of logits at the edges, against PyTorch with the same weights, as
    feature_error is of a picture's features; largest_fp16: magnitude in products of fp16; the rest is against
    the checkpoint's own weights.
    """

    precision: Precision
    int8_prefill: bool
    worst_error: float | None
    feature_error: float | None = None
    largest_fp16: float | None = None
    texts: tuple[TextStatistics, ...] = ()
    layers: tuple[LayerNoise, ...] = ()
    greedy: FirstDifferences | None = None

    @property
    def name(self) -> str:
        return self.precision + (", fast prefill" if self.int8_prefill else "")

    @property
    def noisiest(self) -> Sequence[LayerNoise]:
        """The layers, the worst first."""
        return sorted(self.layers, key=lambda layer: layer.worst)


class Counted(Frozen):
    """How many of `total` comparisons are equal."""

    equal: int
    total: int

    def __str__(self) -> str:
        return f"{self.equal} of {self.total}"


class TokenizerCount(Frozen):
    """The bundle's tokenizer and chat template against transformers' of the checkpoint, over a corpus."""

    texts: Counted
    chats: Counted | None

    @property
    def passed(self) -> bool:
        return all(found is None or found.equal == found.total for found in (self.texts, self.chats))

    def __str__(self) -> str:
        return f"{self.texts} texts" + (f" and {self.chats} chats" if self.chats else "")


class Peak(Frozen):
    """The largest magnitude in the inputs and results of a module's products, which are of fp16."""

    module: str
    magnitude: float

    @property
    def check(self) -> Check:
        layer = next((int(part) for part in self.module.split(".") if part.isdecimal()), None)
        return Check(what="products", measure="magnitude", value=self.magnitude, bound=LIMIT, layer=layer)
