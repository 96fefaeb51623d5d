"""The loop from a prompt to a text: prefill, then one token at a time, as a stream of steps."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from stillgraph.errors import StillgraphError
from stillgraph.in_thread import in_thread
from stillgraph.kv_cache import Graphs
from stillgraph.manifest import Manifest
from stillgraph.options import MAX_NEW_TOKENS, Options
from stillgraph.prompts import Prompt, Prompts
from stillgraph.row import Row, Step
from stillgraph.sampling import Choose, Forced, Sampler, Sampling, is_count
from stillgraph.session import Array, return_memory
from stillgraph.tokenizer import Text
from stillgraph.turn import Turn
from stillgraph.vision.features import Vision

if TYPE_CHECKING:
    from stillgraph.vision.image_file import ImageSource


class Engine:
    """A loaded bundle; `with` closes it. It serves one request at a time: a new one ends the one before.

    A request that comes while another thread is inside a step of one is refused, and so is all use after
    `close`: each with a StillgraphError. A stream that was refused a step has ended.
    """

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
        self.prompts = Prompts(manifest, graphs, text, vision, bundle)
        self._request = 0
        self._turn = Turn()  # held while a request is read, and inside each step

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
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_tokens: Sequence[int] | None = None,
        top_logprobs: int = 0,
    ) -> Generator[Step]:
        """The continuation of a prompt, token by token.

        prompt: text; ids as they are; or a chat, a list of messages {"role": .., "content": ..}, which goes
        through the bundle's chat template: a content is text or a list of parts {"type": "text", "text": ..}
        and {"type": "image"}, with "image" or "path" beside it for its picture.
        images: paths, bytes of files or images of Pillow, in the order of their marks in the prompt, and of
        the parts of a chat without a picture of their own.
        temperature 0 is greedy. stop: one text or several, the first of which ends the text before it.
        stop_tokens: ids that end it in place of the bundle's own; () for none. top_logprobs: how many of the
        likeliest tokens each step tells with their log-probabilities; that of its own it always has.

        With a prefill that continues a cache, the prefix that the cache still holds from the request before
        is not computed again. Raises StillgraphError at once for options, a prompt or an image that cannot
        be used.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = Options(sampling, max_new_tokens, stop, stop_tokens, top_logprobs)
        rows = self._begin([prompt], [images], options)
        return (step for _, step in rows)

    def stream_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        images: Sequence[Sequence[ImageSource]] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: str | Sequence[str] | None = None,
        stop_tokens: Sequence[int] | None = None,
        top_logprobs: int = 0,
    ) -> Generator[tuple[int, Step]]:
        """As `stream` for up to as many prompts as the graphs have rows, each with a length, a random stream
        and images of its own: (row, step), a step of each unfinished row in turn."""
        options = Options(sampling or Sampling(), max_new_tokens, stop, stop_tokens, top_logprobs)
        return self._begin(prompts, images, options)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Step]:
        """`stream`, with its options, for `async for`: each step runs in a thread, and the loop goes on.

        What `stream` raises at once comes with the first step. Closed or canceled, it ends after the step
        that is running. The engine still serves one request at a time: keep others waiting with a lock.
        """
        return in_thread(partial(self.stream, prompt, **options))

    def score(
        self,
        prompt: Prompt,
        *,
        start: int = 1,
        images: Sequence[ImageSource] = (),
        top_logprobs: int = 0,
    ) -> Generator[Step]:
        """The prompt's own tokens from position `start` on, each with its log-probability given those before.

        For a perplexity the default; for a continuation `start` is the number of tokens of its context, and
        another continuation of the same context finds that in the cache. A token is the greedy one where it
        is the first of `top_logprobs`. The graphs give logits of one position a call: the first `start`
        tokens cost a prefill, and each one after them a step of decode, about as long as making it.
        Raises StillgraphError at once, as `stream`, and for a `start` without a token before or behind it.
        """
        _, rows = self._forced(prompt, images, start, Options(stop_tokens=(), top_logprobs=top_logprobs))
        return (step for _, step in rows)

    def logits(
        self, prompt: Prompt, *, start: int = 0, images: Sequence[ImageSource] = ()
    ) -> Generator[Array]:
        """The raw logits [V] after each token of the prompt from position `start` on, one array at a time.

        It costs what `score` does, and an array of its own for each position: with a vocabulary of 262144
        that is 1 MB, so all of them are best not kept.
        """
        forced, rows = self._forced(prompt, images, start, Options(stop_tokens=()), after_last=True)
        return (forced.logits for _ in rows)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against what the graphs can take. Raises StillgraphError."""
        return self.prompts.ids(prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens. Raises StillgraphError."""
        return self.prompts.decode(ids)

    def reset(self) -> None:
        """Forget the cache and the pictures, so that the next request computes its whole prompt.

        A stream that was not read to its end has then ended, as after another request.
        """
        with self._at_work():
            self._request += 1
            self.graphs.reset()
            if self.vision is not None:
                self.vision.reset()

    def close(self) -> None:
        """Give back sessions, buffers and mapped files, after the step that another thread may be in.

        All use after that raises StillgraphError, but another `close`.
        """
        closed: Any = Closed(self.bundle)
        with self._turn.taken(wait=True):
            self.graphs = self.vision = self.prompts = closed
        return_memory()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence[ImageSource]], options: Options
    ) -> Generator[tuple[int, Step]]:
        origin = time.perf_counter() - self.load_seconds
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            problem = f"prompts is of type {type(prompts).__name__}"
            raise StillgraphError("read prompt", problem, "give a list of prompts")
        if not 1 <= len(prompts) <= self.graphs.rows:
            problem = f"{len(prompts)} prompts for graphs of {self.graphs.rows} rows"
            raise StillgraphError(
                "read prompt", problem, "give fewer, or export the bundle with a larger --batch"
            )
        if images and len(images) != len(prompts):
            problem = f"images has {len(images)} lists for {len(prompts)} prompts"
            raise StillgraphError(
                "read prompt", problem, "give one list for each prompt, empty where it has none"
            )
        with self._at_work():
            rows = []
            for index, prompt in enumerate(prompts):
                ids, input_ids = self.prompts.read(prompt, images[index] if images else ())
                rows.append(self._row(ids, input_ids, Sampler(options.sampling, index), options))
            return self._generate(rows, origin)

    def _forced(
        self,
        prompt: Prompt,
        images: Sequence[ImageSource],
        start: int,
        options: Options,
        after_last: bool = False,
    ) -> tuple[Forced, Generator[tuple[int, Step]]]:
        """A request that is given its tokens from `start` on; after_last: and chooses one behind them.

        Then the first token is given from position `start` + 1 on: that one's logits come after `start`.
        """
        origin = time.perf_counter() - self.load_seconds
        with self._at_work():
            ids, input_ids = self.prompts.read(prompt, images)
            if not is_count(start, 0 if after_last else 1) or start >= len(ids):
                problem = f"start is {start!r} and the prompt has {len(ids)} tokens"
                least = "0" if after_last else "1"
                raise StillgraphError("read options", problem, f"give {least} or more, and less than that")
            first = start + after_last
            if min(input_ids[first:], default=0) < 0:
                problem = f"start is {start} and a picture comes behind it"
                raise StillgraphError("read options", problem, "start behind the last picture")
            forced = Forced(ids[first:])
            options = replace(options, max_new_tokens=len(ids) - first + after_last)
            row = self._row(ids[:first], input_ids[:first], forced, options)
            return forced, self._generate([row], origin)

    def _row(self, ids: list[int], input_ids: list[int], choose: Choose, options: Options) -> Row:
        return Row(ids, input_ids, choose, self.text, options, self.manifest.calling.tokens.stop)

    def _generate(self, rows: list[Row], origin: float) -> Generator[tuple[int, Step]]:
        """The steps of a new request. origin: when it began, by a clock that stops while graphs load."""
        self._request += 1
        return self._steps(rows, self._request, origin)

    def _steps(self, rows: list[Row], request: int, origin: float) -> Generator[tuple[int, Step]]:
        fed: list[int | None] | None = None
        while any(row.finish_reason is None for row in rows):
            given, fed, logits = fed, [None] * len(rows), None
            for index, row in enumerate(rows):
                if row.finish_reason is not None:
                    continue
                with self._at_work(request):
                    logits = self._run(rows, given) if logits is None else logits
                    room = len(row.ids) < self.graphs.ctx  # all ids before the new one are in the cache
                    token, text, logprob, top = row.step(logits[index], room)
                    elapsed = time.perf_counter() - self.load_seconds - origin
                fed[index] = token if row.finish_reason is None else None
                yield index, Step(token, text, logprob, row.finish_reason, elapsed, top)

    def _run(self, rows: list[Row], fed: list[int | None] | None) -> Array:
        """Logits [B, V] after the rows' prompts, or after the tokens `fed` behind them."""
        unused = self.graphs.rows - len(rows)
        if fed is not None:
            return self.graphs.decode([*fed, *[None] * unused])
        prompts = [row.input_ids for row in [*rows, *rows[:1] * unused]]  # unused rows get a copy
        if self.vision is not None:
            self.vision.see(prompts, self.graphs.release)
        return self.graphs.prefill(prompts)

    @contextmanager
    def _at_work(self, request: int | None = None) -> Iterator[None]:
        """Keep all others out of the engine. request: that it must still be. Raises StillgraphError."""
        remedy = "finish one stream before the next, or load a second engine"
        with self._turn.taken() as free:
            if not free:
                raise StillgraphError("generate", "another request is running on this engine", remedy)
            if request not in (None, self._request):
                raise StillgraphError("generate", "another request has begun on this engine", remedy)
            yield


class Closed:
    """In the place of what a closed engine had."""

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle

    def __getattr__(self, name: str) -> NoReturn:
        raise StillgraphError("generate", f"the engine of {self._bundle} is closed", "load the bundle again")
