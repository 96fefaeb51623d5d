"""/v1/models, /v1/completions and /v1/chat/completions over a pool of engines."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from stillgraph.engine import Engine
from stillgraph.messages import images_of
from stillgraph.pool import Pool, closed
from stillgraph.row import Step
from stillgraph.serve.answers import Answer, ChatAnswer, TextAnswer
from stillgraph.serve.bodies import Asked, ChatBody, TextBody, read_body
from stillgraph.serve.refusals import Refused, answer, told

T = TypeVar("T")
GONE = 499  # nginx's status of a client that went away; no one reads it
SECONDS_TO_SEND = 60.0  # a body
log = logging.getLogger("stillgraph")


class Api:
    """The routes of the API.

    engine: any of the pool's, to read prompts with; name: that the model is served under; most_bytes: of a
    request's body.
    """

    def __init__(self, pool: Pool, engine: Engine, name: str, most_bytes: int) -> None:
        self._pool, self._engine, self._name, self._most_bytes = pool, engine, name, most_bytes
        self.routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._told(self._completions), methods=["POST"]),
            Route("/v1/chat/completions", self._told(self._chat), methods=["POST"]),
        ]

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(self._described()) if name == self._name else answer(self._other_model(name))

    async def _completions(self, request: Request) -> Response:
        asked: TextBody = read_body(TextBody, await self._body(request))
        self._check(asked)
        ids = await asyncio.to_thread(self._engine.ids, asked.one_prompt())
        return await self._respond(request, asked, TextAnswer, ids, [])

    async def _chat(self, request: Request) -> Response:
        asked: ChatBody = read_body(ChatBody, await self._body(request))
        self._check(asked)
        chat = asked.chat()
        ids = await asyncio.to_thread(self._engine.ids, chat)
        spec = self._engine.manifest.model.vision
        return await self._respond(
            request, asked, ChatAnswer, ids, images_of(chat, (), spec.mark if spec else "")
        )

    async def _respond(
        self, request: Request, asked: Asked, kind: type[Answer], ids: list[int], images: list[Any]
    ) -> Response:
        """Headers go out with the first step, so that whatever is wrong before it has its own status."""
        made = kind(asked, self._name, ids, self._text_of)
        options = asked.options(self._engine.graphs.ctx)
        steps = self._pool.astream(ids, images=images, **options)
        if asked.stream:
            first = await while_there(request, anext(steps))
            return _Events(_events(made, first, steps)) if first else Response(status_code=GONE)
        found = await while_there(request, _all(steps))
        return JSONResponse(made.whole(found)) if found else Response(status_code=GONE)

    async def _body(self, request: Request) -> bytes:
        """A request's body. Raises Refused for one that is too large, slow, or no JSON by its own word."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # Browsers send this type to another site only where that allows it, so no other page may ask.
            raise Refused(415, "the content-type is not application/json; send JSON, and say so.")
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._most_bytes:
                        raise Refused(413, f"the body is over {self._most_bytes} bytes; send less.")
        except TimeoutError:
            raise Refused(408, f"the body took over {SECONDS_TO_SEND:.0f} s; send it faster.") from None
        return bytes(body)

    def _check(self, asked: Asked) -> None:
        """Raises Refused for another model, and Closed where nothing is served any more."""
        if self._pool.closed:
            raise closed()
        if asked.model != self._name:
            raise self._other_model(asked.model)

    def _other_model(self, name: str) -> Refused:
        sentence = f"model {name[:100]!r} is not served here; ask for {self._name!r}."
        return Refused(404, sentence, "model_not_found")

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "stillgraph"}

    def _text_of(self, token: int) -> str:
        return self._engine.decode([token]) if self._engine.text else ""

    def _told(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose errors are told as OpenAI tells them."""

        async def handled(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:  # whatever it is, it is the client's to know
                response = answer(error)
                if response.status_code == 500:
                    log.exception("A request failed.")
                return response

        return handled


class _Events(StreamingResponse):
    """Events as they come. When the client goes, what makes them is closed, wherever it was."""

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def while_there(request: Request, work: Awaitable[T]) -> T | None:
    """What some work gives; None, and the work is canceled, where the client goes before it is done.

    The request's body has been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the next message is that the client is gone
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _all(steps: AsyncGenerator[Step]) -> list[Step]:
    async with aclosing(steps):
        return [step async for step in steps]


async def _events(made: Answer, first: Step, steps: AsyncGenerator[Step]) -> AsyncGenerator[str]:
    async with aclosing(steps):
        try:
            for opening in made.opening():
                yield _event(opening)
            if chunk := made.chunk(first):
                yield _event(chunk)
            async for step in steps:
                if chunk := made.chunk(step):
                    yield _event(chunk)
            for closing in made.closing():
                yield _event(closing)
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is out already
            yield _event(told(error)[1])


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'), allow_nan=False)}\n\n"
