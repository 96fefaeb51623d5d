"""The answers of OpenAI's API, of `Engine.stream`'s steps: an object for a whole one, or chunks of it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from stillgraph.row import Step, TokenLogprob
from stillgraph.serve.bodies import Asked
from stillgraph.tokenizer import UNFINISHED

Json = dict[str, Any]
FINISHED = {None: None, "stop": "stop", "length": "length", "context": "length"}


class Answer:
    """One answer to a request.

    model: the name that it is served under; ids: of the prompt; text_of: the text of one token alone.
    """

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, asked: Asked, model: str, ids: Sequence[int], text_of: Callable[[int], str]) -> None:
        self._asked, self._model, self._ids, self._text_of = asked, model, list(ids), text_of
        self._id, self._created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self._made = 0

    def whole(self, steps: Sequence[Step]) -> Json:
        """The answer at once."""
        text = "".join(step.text for step in steps)
        choice = self._choice(steps, self.content(text), steps[-1])
        if self._asked.return_token_ids:
            choice["prompt_token_ids"] = self._ids
        return {**self._head(self.whole_object), "choices": [choice], "usage": self.usage()}

    def opening(self) -> list[Json]:
        """The chunks before the first step's."""
        return []

    def chunk(self, step: Step) -> Json | None:
        """The chunk of one step; None where it would say nothing."""
        choice = self._choice([step], self.piece(step.text), step)
        told = step.text or step.finish_reason or choice["logprobs"] or "token_ids" in choice
        return self._chunk([choice]) if told else None

    def closing(self) -> list[Json]:
        """The chunks after the last step's."""
        return [self._chunk([]) | {"usage": self.usage()}] if self._asked.wants_usage else []

    def usage(self) -> Json:
        """How many tokens were read, and made so far."""
        asked = len(self._ids)
        return {
            "prompt_tokens": asked,
            "completion_tokens": self._made,
            "total_tokens": asked + self._made,
        }

    def content(self, text: str) -> Json:
        """What a choice has of a whole text."""
        raise NotImplementedError

    def piece(self, text: str) -> Json:
        """What a chunk's choice has of a piece of text."""
        return self.content(text)

    def logprobs(self, steps: Sequence[Step]) -> Json:
        """The log-probabilities of steps, as a choice has them."""
        raise NotImplementedError

    def _choice(self, steps: Sequence[Step], content: Json, last: Step) -> Json:
        self._made += len(steps)
        logprobs = self.logprobs(steps) if self._asked.wants_logprobs else None
        ids = {"token_ids": [step.token for step in steps]} if self._asked.return_token_ids else {}
        reason = FINISHED[last.finish_reason]
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": reason, **ids}

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self._asked.wants_usage else {}
        return {**self._head(self.chunk_object), "choices": choices, **usage}


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def content(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, steps: Sequence[Step]) -> Json:
        return {"content": [self._entry(step) for step in steps], "refusal": None}

    def _entry(self, step: Step) -> Json:
        own = TokenLogprob(step.token, self._text_of(step.token), step.logprob)
        return _token(own) | {"top_logprobs": [_token(top) for top in step.top_logprobs]}


class TextAnswer(Answer):
    """An answer of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, model: str, ids: Sequence[int], text_of: Callable[[int], str]) -> None:
        super().__init__(asked, model, ids, text_of)
        self._offset = 0

    def content(self, text: str) -> Json:
        return {"text": text}

    def logprobs(self, steps: Sequence[Step]) -> Json:
        texts, offsets = [self._text_of(step.token) for step in steps], list[int]()
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [{top.text: top.logprob for top in step.top_logprobs} for step in steps],
            "text_offset": offsets,
        }


def _token(top: TokenLogprob) -> Json:
    """A token that is a part of a character has no bytes that could be told."""
    whole = UNFINISHED not in top.text
    return {
        "token": top.text,
        "logprob": top.logprob,
        "bytes": list(top.text.encode()) if whole else None,
    }
