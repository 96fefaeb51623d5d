"""What a prompt may be: text, ids, a chat; and what is said of anything else. No ONNX Runtime.

The tokenizer has a token a letter, so the text of a chat can be read off its ids.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillgraph.prompts import Prompts

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<model>"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}<model>"
)
MIXED = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]


class Letters:
    special_tokens: dict[str, str] = {}  # noqa: RUF012
    tokenizer = SimpleNamespace(id_to_token=lambda _: None)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [*([0] if special else []), *map(ord, text)]


class Eyes:
    """Vision that remembers the pictures that it was given."""

    spec = SimpleNamespace(mark="<image>", image_token=1)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def place(self, ids: list[int], images: list[Any]) -> list[int]:
        self.seen = list(images)
        return ids


def prompts_of(folder: Path, template: str = PLAIN, vision: Any = None) -> Prompts:
    (folder / "chat_template.jinja").write_text(template)
    manifest: Any = SimpleNamespace(model=SimpleNamespace(vocab_size=256))
    graphs: Any = SimpleNamespace(ctx=200, max_len=200, continues=True)
    text: Any = Letters()
    return Prompts(manifest, graphs, text, vision, folder)


def shown(ids: list[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize("template", [PLAIN, PARTS])
@pytest.mark.parametrize("content", ["a b", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]])
def test_a_chat_goes_through_the_template(tmp_path: Path, template: str, content: Any) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    assert shown(prompts_of(tmp_path, template).ids(messages)) == "<system>s<user>a b<model>"


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.int32), iter])
def test_ids_are_any_integers(tmp_path: Path, kind: Any) -> None:
    found = prompts_of(tmp_path).ids(kind([5, 6]))
    assert found == [5, 6]
    assert {type(token) for token in found} == {int}


WRONG_PROMPTS: list[tuple[Any, str]] = [
    (5, "a prompt of type int was given"),
    (None, "a prompt of type NoneType was given"),
    (b"ab", "a prompt of type bytes was given"),
    (bytearray(b"ab"), "a prompt of type bytearray was given"),
    ([True, False], "a prompt of type list with bool in it was given"),
    ({"role": "user", "content": "a"}, "a prompt of type dict was given"),
    (["a", "b"], "a prompt of type list with str in it was given"),
    ([1, 2.0], "a prompt of type list with int in it was given"),
    (np.array([1.5]), "a prompt of type ndarray with float64 in it was given"),
    (np.array([[1, 2]]), "a prompt of type ndarray with ndarray in it was given"),
]


@pytest.mark.parametrize(("prompt", "said"), WRONG_PROMPTS)
def test_anything_else_is_one_sentence(tmp_path: Path, refused: Any, prompt: Any, said: str) -> None:
    with refused("read prompt", said, "give text, a list of token ids, or a list of messages"):
        prompts_of(tmp_path).ids(prompt)


@pytest.mark.parametrize("prompt", ["a\ud800", [{"role": "user", "content": "a\udcff"}]])
def test_half_a_surrogate_pair_is_one_sentence(tmp_path: Path, refused: Any, prompt: Any) -> None:
    with refused("read prompt", "half of a surrogate pair at character", "give it as valid Unicode"):
        prompts_of(tmp_path).ids(prompt)


def test_what_cannot_be_decoded_is_one_sentence(tmp_path: Path, refused: Any) -> None:
    with refused("read prompt", "list with float in it"):
        prompts_of(tmp_path).decode([1.5])  # type: ignore[list-item]
    with refused("decode", "token id -1 is out of range"):
        prompts_of(tmp_path).decode([-1])


@pytest.mark.parametrize("images", [5, "a.png"])
def test_images_are_a_list(tmp_path: Path, refused: Any, images: Any) -> None:
    with refused("read prompt", "images is of type", "give a list of images"):
        prompts_of(tmp_path).read([5], images)


WRONG_MESSAGES: list[tuple[list[Any], str]] = [
    ([{"content": "a"}], "message 0 has the role None"),
    ([{"role": 1, "content": "a"}], "message 0 has the role 1"),
    ([{"role": "user"}], "message 0 has nothing as content"),
    ([{"role": "user", "content": "a"}, "b"], "message 1 is a value of type str"),
    ([{"role": "user", "content": 5}], "message 0 has a value of type int as content"),
    ([{"role": "user", "content": ["a"]}], "message 0 has a part 0 that is a value of type str"),
    ([{"role": "user", "content": [{"text": "a"}]}], "part 0 that is of the type None and not text or image"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "is of the type 'audio'"),
    ([{"role": "user", "content": [MIXED[0], {"type": "text"}]}], "a part 1 that has nothing as text"),
    (
        [{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}],
        "names a picture by url and not by path or image",
    ),
]


@pytest.mark.parametrize(("messages", "said"), WRONG_MESSAGES)
def test_a_malformed_message_is_one_sentence(
    tmp_path: Path, refused: Any, messages: list[Any], said: str
) -> None:
    with refused("read chat", said, 'write {"role": "user", "content": "text"}'):
        prompts_of(tmp_path, vision=Eyes()).ids(messages)


def test_a_call_of_a_tool_needs_no_content(tmp_path: Path) -> None:
    messages: list[Any] = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert shown(prompts_of(tmp_path).ids(messages)) == "<assistant><model>"


@pytest.mark.parametrize("template", [PLAIN, PARTS])
@pytest.mark.parametrize("content", ["a <image> b", MIXED])
def test_pictures_are_marks_or_parts(tmp_path: Path, template: str, content: Any) -> None:
    eyes = Eyes()
    ids, _ = prompts_of(tmp_path, template, eyes).read([{"role": "user", "content": content}], ["one.png"])
    assert shown(ids) == "<user>a <image> b<model>"
    assert eyes.seen == ["one.png"]


def test_a_part_may_have_its_picture_with_it(tmp_path: Path) -> None:
    """The others come from `images`, in the order of parts and marks."""
    eyes = Eyes()
    text = {"type": "text", "text": "see <image> here"}
    parts = [{"type": "image"}, {"type": "image", "path": "b.png"}, text, {"type": "image", "image": b"c"}]
    messages = [
        {"role": "user", "content": "<image>"},
        {"role": "user", "content": parts},
        {"role": "user", "content": "<image>"},
    ]
    prompts_of(tmp_path, vision=eyes).read(messages, ["0.png", "a.png", "e.png", "d.png", "left.png"])
    assert eyes.seen == ["0.png", "a.png", "b.png", "e.png", b"c", "d.png", "left.png"]


def test_a_model_of_text_refuses_a_part_that_is_a_picture(tmp_path: Path, refused: Any) -> None:
    with refused("read chat", "a message has a picture and the model of", "takes text alone"):
        prompts_of(tmp_path).ids([{"role": "user", "content": MIXED}])
