"""What a request asks for besides its prompt, checked before anything is loaded or run."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from stillgraph.errors import StillgraphError
from stillgraph.sampling import Sampling, is_count
from stillgraph.tokenizer import Stops

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Options:
    """How many tokens are made, how they are chosen, what ends them, and what is told of them.

    stop: strings that end a text, or one; stop_tokens: ids that end it, None for the bundle's own, empty for
    none; top_logprobs: of this many of the likeliest tokens each step tells the log-probability.
    Raises StillgraphError for a value out of range or of a wrong type.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: str | Sequence[str] | None = None
    stop_tokens: Sequence[int] | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_logprobs", 0)):
            if not is_count(getattr(self, name), least):
                problem = f"{name} is {getattr(self, name)!r}"
                raise StillgraphError("read options", problem, f"give {least} or more")
        Stops(self.stop)  # raises
        self.ends(())

    def ends(self, own: Sequence[int]) -> frozenset[int]:
        """The ids that end a text. own: those of the bundle."""
        tokens = own if self.stop_tokens is None else self.stop_tokens
        try:
            return frozenset(map(operator.index, tokens))
        except TypeError:
            problem = f"stop_tokens is {self.stop_tokens!r}"
            raise StillgraphError("read options", problem, "give a list of token ids") from None
