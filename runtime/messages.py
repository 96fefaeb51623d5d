"""Messages of a chat as Hugging Face has them: a role, and text or a list of parts of text and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

from stillgraph.errors import StillgraphError

if TYPE_CHECKING:
    from stillgraph.vision.image_file import ImageSource

Message = Mapping[str, Any]
KINDS = ("text", "image")


def is_chat(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list that begins with a message, well formed or not."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises StillgraphError for the first message, or part of one, that is not well formed.

    Whether the roles come in an order that the model knows is for its template to say.
    """
    for index, message in enumerate(messages):
        if problem := _problem(message):
            remedy = 'write {"role": "user", "content": "text"}, or a list of parts as content'
            raise StillgraphError("read chat", f"message {index} {problem}", remedy)


def images_of(messages: Sequence[Message], images: Sequence[ImageSource], mark: str) -> list[ImageSource]:
    """The pictures of a chat in their order: a part's own, or the next of `images` where it has none.

    mark: what stands for a picture in a text. What is left of `images` comes last.
    """
    others = iter(images)
    found: list[ImageSource] = []
    for message in messages:
        content = message.get("content") or ()
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                found += islice(others, part["text"].count(mark))
                continue
            own = part.get("image", part.get("path"))
            found += islice(others, 1) if own is None else [own]
    return [*found, *others]


def has_pictures(messages: Sequence[Message]) -> bool:
    """Whether a part of a message is a picture."""
    return any(True for message in messages for _ in _pictures(message))


def in_parts(message: Message, mark: str) -> Message:
    """A message whose content is a list of parts: an image for each mark of a text, and text between."""
    content = message.get("content")
    if isinstance(content, list | tuple):  # a template asks for no more of a picture than that it is one
        return {**message, "content": [p if p["type"] == "text" else {"type": "image"} for p in content]}
    if not isinstance(content, str):
        return message
    image: Message = {"type": "image"}
    texts = [{"type": "text", "text": text} if text else None for text in content.split(mark)]
    parts = [part for text in texts for part in (image, text)][1:]
    return {**message, "content": [part for part in parts if part is not None]}


def in_text(message: Message, mark: str) -> Message:
    """A message whose content is one text, with a mark for each part that is a picture."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": "".join(p["text"] if p["type"] == "text" else mark for p in content)}


def _pictures(message: Message) -> Iterator[Message]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        yield from (part for part in content if part["type"] == "image")


def _problem(message: object) -> str | None:
    """What is wrong with a message, or None."""
    if not isinstance(message, Mapping):
        return f"is {_kind(message)}"
    if not isinstance(message.get("role"), str):
        return f"has the role {message.get('role')!r}"
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return None
    if not isinstance(content, list | tuple):
        return f"has {_kind(content)} as content"
    found = ((at, _problem_of_part(part)) for at, part in enumerate(content))
    return next((f"has a part {at} that {problem}" for at, problem in found if problem), None)


def _problem_of_part(part: object) -> str | None:
    if not isinstance(part, Mapping):
        return f"is {_kind(part)}"
    if part.get("type") not in KINDS:
        return f"is of the type {part.get('type')!r} and not {' or '.join(KINDS)}"
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        return f"has {_kind(part.get('text'))} as text"
    if part["type"] == "image" and (away := {"url", "base64"} & set(part)):
        return f"names a picture by {min(away)} and not by path or image"
    return None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
