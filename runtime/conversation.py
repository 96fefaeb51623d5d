"""A chat whose ids are only appended to, so that each turn computes its new tokens and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stillgraph.engine import Engine
from stillgraph.messages import Message
from stillgraph.row import Step

if TYPE_CHECKING:
    from stillgraph.vision.image_file import ImageSource


class Conversation:
    """Messages, and the ids that the model has seen of them.

    The whole chat, rendered and encoded again, is not the ids that the model made: a text has more than one
    encoding, and templates trim. What was prompted and answered therefore stays as ids, and only the text
    that the template puts behind an answer is encoded.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.clear()

    def clear(self) -> None:
        """Start over."""
        self.messages: list[Message] = []
        self.images: list[ImageSource] = []  # of all messages, then those shown for the next question
        self._shown = 0
        self._text = ""  # the chat as rendered for the last answer
        self._answer = ""
        self._ids: list[int] = []  # of `_text` and the answer

    def show(self, image: ImageSource) -> None:
        """Put a picture before the next question."""
        self.images.append(image)
        self._shown += 1

    def forget(self) -> None:
        """Take back the pictures of a question that was not answered."""
        del self.images[len(self.images) - self._shown :]
        self._shown = 0

    def ids(self, question: str) -> list[int]:
        """The ids of the chat with a question, ready for the answer. Raises StillgraphError."""
        text = self.engine.prompts.chat_text([*self.messages, self._user(question)])
        behind = self._behind_answer(text)
        if behind is None:
            return self.engine.prompts.encode_chat(text)
        return self._ids + self.engine.prompts.encode_chat(behind)

    def add(self, question: str, ids: Sequence[int], steps: Sequence[Step]) -> None:
        """Take in an answer: the question, the ids that were prompted, and the steps that came."""
        answer = "".join(step.text for step in steps)
        self._text = self.engine.prompts.chat_text([*self.messages, self._user(question)])
        self._answer = answer
        self.messages += [self._user(question), {"role": "assistant", "content": answer}]
        self._shown = 0
        # The stop token ended the answer; the template writes it. A stop string is in no text and stays out.
        tokens = [step.token for step in steps]
        tokens = tokens[:-1] if tokens[-1] in self.engine.manifest.calling.tokens.stop else tokens
        whole = self.engine.decode(tokens) == answer
        self._ids = [*ids, *tokens] if whole else []

    def _behind_answer(self, text: str) -> str | None:
        """What a rendered chat has behind the last answer; None where it is not the same chat up to there."""
        if not self._ids or not text.startswith(self._text):
            return None
        rest = text[len(self._text) :]
        for answer in (self._answer, self._answer.strip()):  # templates trim
            if rest.startswith(answer):
                return rest[len(answer) :]
        return None

    def _user(self, question: str) -> Message:
        return self.engine.prompts.user(question, self._shown)
