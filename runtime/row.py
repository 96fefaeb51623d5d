"""One row's way through a request: its ids, its text, and why it ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stillgraph.errors import CheckFailed
from stillgraph.options import Options
from stillgraph.sampling import Choose, likeliest
from stillgraph.session import Array
from stillgraph.tokenizer import Stops, Stream, Text

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token that could have come. text: of it alone, which may be a part of a character; empty without a
    tokenizer and for a special token."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Step:
    """One token of a stream.

    token: its id; text: what can be shown since the step before; logprob: natural logarithm of the token's
    probability under the model's own distribution, the softmax of the raw logits, before a repetition
    penalty, temperature, top_k, top_p and min_p; finish_reason: None but in the last step, which is `stop`
    after a stop token or stop string, `length` after max_new_tokens, `context` when the cache is full;
    elapsed: seconds since the request, loading graphs not counted; top_logprobs: the likeliest tokens of the
    same distribution, the likeliest first, as many as were asked for: the chosen one may not be among them.
    """

    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None
    elapsed: float
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Row:
    """A row of a request.

    input_ids: the prompt as the graphs are given it, with its pictures in place of their image tokens;
    stop_tokens: of the bundle; text: None where there is no tokenizer.
    """

    def __init__(
        self,
        prompt: list[int],
        input_ids: list[int],
        choose: Choose,
        text: Text | None,
        options: Options,
        stop_tokens: Sequence[int],
    ) -> None:
        self.prompt, self.input_ids, self.ids = prompt, input_ids, list(prompt)
        self._choose, self._text, self._options = choose, text, options
        self._stream = Stream(text) if text else None
        self._stops, self._stop_tokens = Stops(options.stop), options.ends(stop_tokens)
        self.finish_reason: FinishReason | None = None

    def step(self, logits: Array, room: bool) -> tuple[int, str, float, tuple[TokenLogprob, ...]]:
        """Choose the next token from logits [V]: (token, text, logprob, top_logprobs).

        room: the cache can take it. Raises CheckFailed for logits that are not finite.
        """
        token, logprob = self._choose(logits, self.ids)
        if not math.isfinite(logprob):
            problem = f"the graph gave logits that are not finite, at position {len(self.ids)}"
            raise CheckFailed("generate", problem, "run 'stillgraph validate' on the bundle")
        top = self._top(logits)
        self.ids.append(token)
        return token, self._shown(token, room), logprob, top

    def _shown(self, token: int, room: bool) -> str:
        """The text that can be shown now; says why the row has ended where it has."""
        stopped = token in self._stop_tokens
        text, cut = self._stops.push("" if stopped or self._stream is None else self._stream.push(token))
        if stopped or cut:
            self.finish_reason = "stop"
        elif len(self.ids) - len(self.prompt) == self._options.max_new_tokens:
            self.finish_reason = "length"
        elif not room:
            self.finish_reason = "context"
        return text if cut or self.finish_reason is None else text + self._flush()

    def _flush(self) -> str:
        text, cut = self._stops.push(self._stream.flush() if self._stream else "")
        if cut:
            self.finish_reason = "stop"
        return text + self._stops.flush()

    def _top(self, logits: Array) -> tuple[TokenLogprob, ...]:
        found = likeliest(logits, self._options.top_logprobs)
        return tuple(
            TokenLogprob(token, self._text.decode([token]) if self._text else "", logprob)
            for token, logprob in found
        )
