"""What a request is refused with: a status, and OpenAI's error object around one sentence."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.pool import Closed, Full

RETRY_AFTER = {"retry-after": "1"}  # seconds


class Refused(Exception):
    """A request that is answered with a status and a sentence."""

    def __init__(self, status: int, sentence: str, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code = status, code


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an error, and its object."""
    status, code = _status(error)
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    sentence = str(error)
    if status == 500 and not isinstance(error, StillgraphError):
        sentence = f"unexpected {type(error).__name__} ({sentence[:300]}); the server's log says where."
    return status, {"error": {"message": sentence, "type": kind, "param": None, "code": code}}


def answer(error: Exception) -> JSONResponse:
    """The response that tells an error."""
    status, content = told(error)
    return JSONResponse(content, status, RETRY_AFTER if status in (429, 503) else None)


async def no_such_page(request: Request, error: Exception) -> JSONResponse:
    """For the errors that Starlette raises: no such path, or not with that method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "there is no" if status == 404 else "there is another method for"
    sentence = f"{what} {request.method} {request.url.path[:200]}; see the README of stillgraph serve."
    return answer(Refused(status, sentence))


def _status(error: Exception) -> tuple[int, str | None]:
    if isinstance(error, Refused):
        return error.status, error.code
    if isinstance(error, Full):
        return 429, "queue_full"
    if isinstance(error, Closed):
        return 503, "closed"
    if isinstance(error, StillgraphError) and not isinstance(error, CheckFailed):
        return 400, None
    return 500, None
