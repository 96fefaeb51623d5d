"""A chat only appends: what the model has seen stays as the ids that it saw."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from stillgraph import Step
from stillgraph.chat_template import Template
from stillgraph.conversation import Conversation

TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STOP = 7


class Letters:
    """An engine's text side: a letter is its code point; 1000 + n is the pair of letters at n."""

    manifest = SimpleNamespace(calling=SimpleNamespace(tokens=SimpleNamespace(stop=(STOP,))))

    def __init__(self, template: str = TEMPLATE) -> None:
        self.template, self.encoded = Template(template, {}), list[str]()
        self.prompts = self

    def chat_text(self, messages) -> str:
        return self.template.render(messages)

    def encode_chat(self, text: str) -> list[int]:
        self.encoded.append(text)
        return [ord(letter) for letter in text]

    def user(self, content: str, images: int = 0) -> dict[str, str]:
        return {"role": "user", "content": "#" * images + content}

    def decode(self, ids) -> str:
        return "".join("ab" if key >= 1000 else chr(key) for key in ids if key != STOP)


def steps(tokens: list[int], engine: Letters, cut: int | None = None) -> list[Step]:
    text = engine.decode(tokens)[:cut]
    return [Step(t, text if i == 0 else "", 0.0, None, 0.0) for i, t in enumerate(tokens)]


def test_each_turn_begins_with_all_that_the_model_saw() -> None:
    engine = Letters()
    chat, seen = Conversation(engine), list[int]()
    for turn in range(10):
        ids = chat.ids(f"q{turn}")
        assert ids[: len(seen)] == seen
        answer = [1000 + turn, ord("c")]  # ids that no encoding of their text gives
        chat.add(f"q{turn}", ids, steps([*answer, STOP], engine))
        seen = ids + answer
    assert engine.encoded[1:] == [f"<end><user>q{turn}<end><assistant>" for turn in range(1, 10)]
    assert len(chat.messages) == 20


def test_an_answer_that_the_template_trims_stays_as_it_was() -> None:
    engine = Letters()
    chat = Conversation(engine)
    ids = chat.ids("q")
    answer = [ord(" "), ord("a"), ord("\n")]
    chat.add("q", ids, steps([*answer, STOP], engine))
    assert chat.ids("r") == ids + answer + [ord(x) for x in "<end><user>r<end><assistant>"]


@pytest.mark.parametrize("cut", [1, 2])
def test_an_answer_cut_by_a_stop_string_is_encoded_again(cut: int) -> None:
    """The model saw more than what was shown: going on from its ids would go on from the rest."""
    engine = Letters()
    chat = Conversation(engine)
    chat.add("q", chat.ids("q"), steps([ord(x) for x in "abc"], engine, cut))
    shown = "abc"[:cut]
    whole = f"<bos><user>q<end><assistant>{shown}<end><user>r<end><assistant>"
    assert chat.ids("r") == [ord(x) for x in whole]


def test_a_template_that_rewrites_the_past_is_encoded_again() -> None:
    engine = Letters("{{ messages | length }}" + TEMPLATE)
    chat = Conversation(engine)
    chat.add("q", chat.ids("q"), steps([ord("a"), STOP], engine))
    assert engine.decode(chat.ids("r")).startswith("3<bos>")


def test_clear_begins_anew() -> None:
    engine = Letters()
    chat = Conversation(engine)
    first = chat.ids("q")
    chat.add("q", first, steps([ord("a"), STOP], engine))
    chat.clear()
    assert chat.ids("q") == first
    assert chat.messages == []


def test_pictures_stay_with_the_question_they_were_shown_before() -> None:
    engine = Letters()
    conversation = Conversation(engine)  # type: ignore[arg-type]
    conversation.show("one.png")
    conversation.show("two.png")
    ids = conversation.ids("what?")
    assert engine.encoded[-1].count("#") == 2
    conversation.add("what?", ids, steps([ord("x")], engine))
    conversation.show("lost.png")
    conversation.ids("and this?")
    conversation.forget()
    assert conversation.images == ["one.png", "two.png"]
    conversation.ids("really?")
    whole = engine.prompts.chat_text([*conversation.messages, engine.prompts.user("really?")])
    assert whole.count("#") == 2
    conversation.clear()
    assert conversation.images == []
