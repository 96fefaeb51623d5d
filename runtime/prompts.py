"""From a prompt - text, token ids or a chat - to the ids that the graphs are given."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stillgraph.chat_template import Template, read_template
from stillgraph.errors import StillgraphError
from stillgraph.kv_cache import Graphs
from stillgraph.manifest import Manifest
from stillgraph.messages import (
    Message,
    check_messages,
    has_pictures,
    images_of,
    in_parts,
    in_text,
    is_chat,
)
from stillgraph.tokenizer import Text
from stillgraph.vision.features import Vision

if TYPE_CHECKING:
    from stillgraph.vision.image_file import ImageSource

Prompt = str | Sequence[int] | Sequence[Message]
STAGE = "read prompt"


class Prompts:
    """Reads prompts for one bundle."""

    def __init__(
        self, manifest: Manifest, graphs: Graphs, text: Text | None, vision: Vision | None, bundle: Path
    ) -> None:
        self._manifest, self._graphs, self._text, self._bundle = manifest, graphs, text, bundle
        self._vision = vision
        self._template: Template | None = None

    def read(self, prompt: Prompt, images: Sequence[ImageSource] = ()) -> tuple[list[int], list[int]]:
        """A prompt's ids, and what the graphs are given for them with its pictures among them.

        Raises StillgraphError.
        """
        ids = self.ids(prompt)
        if isinstance(images, str) or not isinstance(images, Sequence):
            problem = f"images is of type {type(images).__name__}"
            raise StillgraphError(STAGE, problem, "give a list of images")
        if self._vision is None:
            if images:
                problem = f"{len(images)} images for {self._bundle}, whose model takes text alone"
                raise StillgraphError(STAGE, problem, "leave them out, or use a model that sees")
            return ids, ids
        if is_chat(prompt):
            images = images_of(prompt, images, self._vision.spec.mark)
        return ids, self._vision.place(ids, images)

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked against what the graphs can take. Raises StillgraphError."""
        if is_chat(prompt):
            ids = self.encode_chat(self.chat_text(prompt))
        elif isinstance(prompt, str):
            ids = self._encode(prompt, special=True) if prompt else []
        else:
            ids = _token_ids(prompt)
        self._check(ids)
        return ids

    def chat_text(self, messages: Sequence[Message]) -> str:
        """A chat as the template renders it, ready for the model's answer. Raises StillgraphError."""
        check_messages(messages)
        self._template = self._template or read_template(self._bundle, self._tokenizer().special_tokens)
        mark = self._vision.spec.mark if self._vision else ""
        if not mark and has_pictures(messages):
            problem = f"a message has a picture and the model of {self._bundle} takes text alone"
            raise StillgraphError("read chat", problem, "leave it out, or use a model that sees")
        if not self._template.takes_parts:
            messages = [in_text(message, mark) for message in messages]
        elif mark:
            messages = [in_parts(message, mark) for message in messages]
        return self._template.render(messages)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of text that a chat template rendered, which has its special tokens. Raises StillgraphError."""
        return self._encode(text, special=False)

    def user(self, content: str, images: int = 0) -> Message:
        """A user's message; marks of pictures that it lacks are put before it, a line each."""
        lacking = images - content.count(self._vision.spec.mark) if self._vision else 0
        marks = f"{self._vision.spec.mark}\n" * lacking if self._vision else ""
        return {"role": "user", "content": marks + content}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens; of an id that is none, nothing. Raises StillgraphError."""
        given = _token_ids(ids)
        if wrong := [token for token in given if not 0 <= token < 1 << 32]:
            raise StillgraphError("decode", f"token id {wrong[0]} is out of range", "give ids of 0 or more")
        return self._tokenizer().decode(given)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"the text has half of a surrogate pair at character {error.start}"
            raise StillgraphError(STAGE, problem, "give it as valid Unicode") from error
        return self._tokenizer().encode(self._expanded(text), special)

    def _tokenizer(self) -> Text:
        if self._text is None:
            raise StillgraphError(STAGE, f"{self._bundle} has no tokenizer", "give token ids instead")
        return self._text

    def _expanded(self, text: str) -> str:
        """Text with image tokens for the marks of pictures."""
        if self._vision is None:
            return text
        token = self._tokenizer().tokenizer.id_to_token(self._vision.spec.image_token)
        return text if token is None else self._vision.expanded(text, token)

    def _check(self, ids: list[int]) -> None:
        graphs, vocab = self._graphs, self._manifest.model.vocab_size
        if not ids:
            raise StillgraphError(STAGE, "the prompt is empty", "give at least one token")
        wrong = [token for token in ids if not 0 <= token < vocab]
        if wrong:
            problem = f"token id {wrong[0]} is outside the vocabulary of {vocab}"
            raise StillgraphError(STAGE, problem, f"give ids from 0 to {vocab - 1}")
        if len(ids) > graphs.ctx:
            problem = f"the prompt has {len(ids)} tokens and the cache takes {graphs.ctx}"
            raise StillgraphError(STAGE, problem, "shorten it, or export with a larger --ctx")
        if len(ids) > graphs.max_len and not graphs.continues:
            problem = f"the prompt has {len(ids)} tokens and the prefill graph takes {graphs.max_len}"
            again = f"stillgraph export prefill --max-len {graphs.max_len} --ctx {graphs.ctx}"
            remedy = f"shorten it, or add a prefill that continues a cache with '{again}'"
            raise StillgraphError(STAGE, problem, remedy)


def _token_ids(prompt: object) -> list[int]:
    """Ids of anything that iterates over integers: a list, an array of one dimension."""
    kind = f"a prompt of type {type(prompt).__name__}"
    try:
        if isinstance(prompt, bytes | bytearray | memoryview | Mapping):
            raise TypeError
        tokens = list(prompt)  # type: ignore[call-overload]
        if tokens:
            kind += f" with {type(tokens[0]).__name__} in it"
        if any(isinstance(token, bool) for token in tokens):
            raise TypeError
        return [operator.index(token) for token in tokens]
    except TypeError:
        remedy = "give text, a list of token ids, or a list of messages"
        raise StillgraphError(STAGE, f"{kind} was given", remedy) from None
