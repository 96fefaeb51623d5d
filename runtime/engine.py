"""The loop from a prompt to a text: prefill, then one token at a time, as a stream of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stillgraph.chat_template import Message, Template, in_parts, read_template
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.kv_cache import Graphs
from stillgraph.manifest import Manifest
from stillgraph.sampling import Sampler, Sampling, with_defaults
from stillgraph.session import Array
from stillgraph.tokenizer import Stops, Stream, Text
from stillgraph.vision.features import Vision

if TYPE_CHECKING:
    from stillgraph.vision.image_file import ImageSource

FinishReason = Literal["stop", "length", "context"]
Prompt = str | Sequence[int]
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Step:
    """One token of a stream.

    token: its id; text: what can be shown since the step before; logprob: log-probability of the token under
    the model's own distribution; finish_reason: None but in the last step, which is `stop` after a stop token
    or stop string, `length` after max_new_tokens, `context` when the cache is full; elapsed: seconds since
    the request, loading graphs not counted.
    """

    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None
    elapsed: float


class Row:
    """One row's way through a request: its ids, its sampler, its text, and why it ended.

    input_ids: the prompt as the graphs are given it, with its pictures in place of their image tokens.
    """

    def __init__(
        self,
        prompt: list[int],
        input_ids: list[int],
        sampler: Sampler,
        text: Stream | None,
        stops: Stops,
        limit: int,
    ) -> None:
        self.prompt, self.input_ids, self.ids = prompt, input_ids, list(prompt)
        self._sampler, self._text, self._stops, self._limit = sampler, text, stops, limit
        self.finish_reason: FinishReason | None = None

    def step(self, logits: Array, stop_tokens: frozenset[int], room: bool) -> tuple[int, str, float]:
        """Choose the next token from logits [V]: (token, text, logprob). room: the cache can take it."""
        token, logprob = self._sampler(logits, self.ids)
        if not math.isfinite(logprob):
            problem = f"the graph gave logits that are not finite, at position {len(self.ids)}"
            raise CheckFailed("generate", problem, "run 'stillgraph validate' on the bundle")
        self.ids.append(token)
        stopped = token in stop_tokens
        text, cut = self._stops.push("" if stopped or self._text is None else self._text.push(token))
        if stopped or cut:
            self.finish_reason = "stop"
        elif len(self.ids) - len(self.prompt) == self._limit:
            self.finish_reason = "length"
        elif not room:
            self.finish_reason = "context"
        return token, text if cut or self.finish_reason is None else text + self._flush(), logprob

    def _flush(self) -> str:
        text, cut = self._stops.push(self._text.flush() if self._text else "")
        if cut:
            self.finish_reason = "stop"
        return text + self._stops.flush()


class Engine:
    """A loaded bundle. One request at a time: a new one ends the stream before it."""

    def __init__(
        self,
        manifest: Manifest,
        graphs: Graphs,
        text: Text | None,
        bundle: Path,
        vision: Vision | None = None,
    ) -> None:
        """text: None for a bundle without a tokenizer, which takes and gives ids alone."""
        self.manifest, self.graphs, self.text, self.bundle = manifest, graphs, text, bundle
        self.vision = vision
        self._stop_tokens = frozenset(manifest.calling.tokens.stop)
        self._request = 0
        self._template: Template | None = None

    @property
    def load_seconds(self) -> float:
        """All time spent on loading and unloading graphs so far."""
        return self.graphs.load_seconds + (self.vision.load_seconds if self.vision else 0.0)

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Step]:
        """The continuation of a prompt (text, or ids as they are), token by token.

        Options of sampling that are None are as the model's makers set them (`calling.sampling` of the
        manifest); temperature 0 always takes the most likely token.
        images: paths, bytes of files or images of Pillow, in the order of their marks in the prompt. With a
        prefill that continues a cache, the prefix that the cache still holds from the request before is not
        computed again. Raises StillgraphError at once for options, a prompt or an image that cannot be used.
        """
        given = temperature, top_k, top_p, min_p, repetition_penalty
        sampling = with_defaults(self.manifest.calling.sampling, *given, seed=seed)
        rows = self.stream_batch([prompt], sampling, [images], max_new_tokens=max_new_tokens, stop=stop)
        return (step for _, step in rows)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        images: Sequence[Sequence[ImageSource]] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, Step]]:
        """As `stream` for up to as many prompts as the graphs have rows, each with a length, a random stream
        and images of its own: (row, step), a step of each unfinished row in turn."""
        began, loading = time.perf_counter(), self.load_seconds
        if max_new_tokens < 1:
            raise StillgraphError("read options", f"max_new_tokens is {max_new_tokens}", "give 1 or more")
        if not 1 <= len(prompts) <= self.graphs.rows:
            problem = f"{len(prompts)} prompts for graphs of {self.graphs.rows} rows"
            raise StillgraphError(
                "read prompt", problem, "give fewer, or export the bundle with a larger --batch"
            )
        rows = []
        for index, prompt in enumerate(prompts):
            stream = Stream(self.text) if self.text else None
            sampler = Sampler(sampling or with_defaults(self.manifest.calling.sampling), index)
            given = images[index] if images else ()
            ids = self.ids(prompt)
            input_ids = self._placed(ids, given)
            rows.append(Row(ids, input_ids, sampler, stream, Stops(stop), max_new_tokens))
        self._request += 1
        return self._generate(rows, self._request, began - loading)

    def reset(self) -> None:
        """Forget the cache and the pictures, so that the next request computes its whole prompt."""
        self.graphs.reset()
        if self.vision is not None:
            self.vision.reset()

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready for the model's answer. Raises StillgraphError."""
        return self.encode_chat(self.chat_text(messages))

    def user(self, content: str, images: int = 0) -> Message:
        """A user's message; marks of pictures that it lacks are put before it, a line each."""
        lacking = images - content.count(self.vision.spec.mark) if self.vision else 0
        marks = f"{self.vision.spec.mark}\n" * lacking if self.vision else ""
        return {"role": "user", "content": marks + content}

    def chat_text(self, messages: Sequence[Message]) -> str:
        """A chat as the template renders it, ready for the model's answer. Raises StillgraphError."""
        self._template = self._template or read_template(self.bundle, self._tokenizer().special_tokens)
        if self.vision is not None and self._template.takes_parts:
            messages = [in_parts(message, self.vision.spec.mark) for message in messages]
        return self._template.render(messages)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of text that a chat template rendered, which has its special tokens. Raises StillgraphError."""
        return self._tokenizer().encode(self._expanded(text), special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens. Raises StillgraphError."""
        return self._tokenizer().decode(ids)

    def _tokenizer(self) -> Text:
        if self.text is None:
            raise StillgraphError("read chat", f"{self.bundle} has no tokenizer", "give token ids instead")
        return self.text

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against what the graphs can take. Raises StillgraphError."""
        if isinstance(prompt, str):
            if self.text is None:
                raise StillgraphError(
                    "read prompt", f"{self.bundle} has no tokenizer", "give token ids instead"
                )
            ids = self.text.encode(self._expanded(prompt)) if prompt else []
        else:
            ids = [int(token) for token in prompt]
        self._check(ids)
        return ids

    def _expanded(self, text: str) -> str:
        """Text with image tokens for the marks of pictures."""
        if self.vision is None:
            return text
        token = self._tokenizer().tokenizer.id_to_token(self.vision.spec.image_token)
        return text if token is None else self.vision.expanded(text, token)

    def _placed(self, ids: list[int], images: Sequence[ImageSource]) -> list[int]:
        """What the graphs are given for ids and the pictures among them. Raises StillgraphError."""
        if self.vision is not None:
            return self.vision.place(ids, images)
        if images:
            problem = f"{len(images)} images for {self.bundle}, whose model takes text alone"
            raise StillgraphError("read prompt", problem, "leave them out, or use a model that sees")
        return ids

    def _check(self, ids: list[int]) -> None:
        graphs, vocab = self.graphs, self.manifest.model.vocab_size
        if not ids:
            raise StillgraphError("read prompt", "the prompt is empty", "give at least one token")
        wrong = [token for token in ids if not 0 <= token < vocab]
        if wrong:
            problem = f"token id {wrong[0]} is outside the vocabulary of {vocab}"
            raise StillgraphError("read prompt", problem, f"give ids from 0 to {vocab - 1}")
        if len(ids) > graphs.ctx:
            problem = f"the prompt has {len(ids)} tokens and the cache takes {graphs.ctx}"
            raise StillgraphError("read prompt", problem, "shorten it, or export with a larger --ctx")
        if len(ids) > graphs.max_len and not graphs.continues:
            problem = f"the prompt has {len(ids)} tokens and the prefill graph takes {graphs.max_len}"
            again = f"stillgraph export prefill --max-len {graphs.max_len} --ctx {graphs.ctx}"
            remedy = f"shorten it, or add a prefill that continues a cache with '{again}'"
            raise StillgraphError("read prompt", problem, remedy)

    def _generate(self, rows: list[Row], request: int, origin: float) -> Iterator[tuple[int, Step]]:
        """origin: when the request began, on a clock that is stopped while graphs are loaded."""
        self._still_mine(request)
        idle = [rows[0].input_ids] * (self.graphs.rows - len(rows))  # unused rows get a copy
        prompts = [row.input_ids for row in rows] + idle
        if self.vision is not None:
            self.vision.see(prompts, self.graphs.release)
        logits = self.graphs.prefill(prompts)
        while True:
            fed: list[int | None] = [None] * self.graphs.rows
            for index, row in enumerate(rows):
                if row.finish_reason is not None:
                    continue
                room = len(row.ids) < self.graphs.ctx  # all ids before the new one are in the cache
                token, text, logprob = row.step(logits[index], self._stop_tokens, room)
                fed[index] = token if row.finish_reason is None else None
                elapsed = time.perf_counter() - self.load_seconds - origin
                yield index, Step(token, text, logprob, row.finish_reason, elapsed)
                self._still_mine(request)
            if all(token is None for token in fed):
                return
            logits = self.graphs.decode(fed)

    def _still_mine(self, request: int) -> None:
        if request != self._request:
            remedy = "finish one stream before the next, or load a second engine"
            raise StillgraphError("generate", "another request has begun on this engine", remedy)
