"""The bodies of requests, as OpenAI's API has them, and what they ask of `Engine.stream`.

What would change an answer and is not done here is refused by name; what changes none is ignored.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from stillgraph.errors import StillgraphError

MOST_STOPS = 16
Zero = Annotated[float, Field(ge=0, le=0)]
Ignored = Any
CHOICE = re.compile(r"(str|list\[.*|constrained-.*|tagged-union.*)$")  # a type in the place of an error


class _Strict(BaseModel):
    """A part of a body: an unknown key is an error, and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """include_usage: whether a last chunk without a choice tells the usage."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class Asked(_Strict):
    """What both kinds of completion ask for.

    top_k, min_p, repetition_penalty and return_token_ids are none of OpenAI's, and named as vLLM names them.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    return_token_ids: bool | None = None

    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    user: Ignored = None

    def options(self, ctx: int) -> dict[str, Any]:
        """The options of `Engine.stream`, with its defaults for what was not said. ctx: of the graphs."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**given, "max_new_tokens": min(self.most_tokens(ctx), ctx), "top_logprobs": self.likeliest()}

    def most_tokens(self, ctx: int) -> int:
        """How many tokens to make at most."""
        return self.max_tokens or ctx

    def likeliest(self) -> int:
        """How many of the likeliest tokens are told at each step."""
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' log-probabilities are told."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextBody(Asked):
    """A body of /v1/completions. prompt: one text, or the ids of one."""

    prompt: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    def most_tokens(self, ctx: int) -> int:
        return self.max_tokens or 16  # OpenAI's default

    def likeliest(self) -> int:
        return self.logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def one_prompt(self) -> str | list[int]:
        """The prompt, out of the list that it may be in. Raises StillgraphError for an empty one."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        return prompt  # type: ignore[no-any-return]


class TextPart(_Strict):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: here in the URL itself. detail: for models that look at parts of a picture."""

    url: str
    detail: Ignored = None


class ImagePart(_Strict):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: Ignored = None
    refusal: None = None

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template reads it, with each picture's bytes. Raises StillgraphError."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": [_part(part) for part in self.content]}


class ChatBody(Asked):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    def most_tokens(self, ctx: int) -> int:
        return self.max_completion_tokens or self.max_tokens or ctx

    def likeliest(self) -> int:
        return (self.top_logprobs or 0) if self.logprobs else 0

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def chat(self) -> list[dict[str, Any]]:
        """The messages as a chat template reads them. Raises StillgraphError."""
        return [message.for_template() for message in self.messages]


def read_body(kind: type[Asked], body: bytes) -> Any:
    """A body of a kind. Raises StillgraphError, whose value names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _wrong(error.errors(include_url=False)) from error


def _wrong(errors: Sequence[Any]) -> StillgraphError:
    sizes = (error for error in errors if error["type"] in ("too_long", "too_short"))
    first = next(sizes, errors[0])  # of a choice of types each tells what it lacks, and a size the most
    if first["type"] == "json_invalid":
        return StillgraphError("read request", f"the body is not JSON ({first['msg']})", "send a JSON object")
    where = ".".join(part for part in map(str, first["loc"]) if not CHOICE.match(part)) or "the body"
    if first["type"] == "extra_forbidden":
        return StillgraphError("read request", f"{where} is not known here", "leave it out")
    if first["type"] == "missing":
        return StillgraphError("read request", f"{where} is missing", "give it")
    value = repr(first["input"])
    shown = value if len(value) <= 60 else f"{value[:60]}..."
    said = first["msg"][:1].lower() + first["msg"][1:]
    return StillgraphError("read request", f"{where} is {shown}", said)


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    head, _, data = part.image_url.url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        problem = f"a picture's URL begins with {part.image_url.url[:30]!r}"
        raise StillgraphError("read image", problem, "put the picture into it, as data:image/png;base64,...")
    try:
        return {"type": "image", "image": base64.b64decode(data, validate=True)}
    except binascii.Error as error:
        problem = f"a picture's data: URL is not base64 ({error})"
        raise StillgraphError("read image", problem, "encode the file's bytes") from error
