"""Pictures of a prompt: their ids, what is computed when, and what fills the rows. No ONNX Runtime here.

The stand-in for a vision graph gives picture pixels of value v the features v + 0, v + 1, v + 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from stillgraph.chat_template import Template
from stillgraph.errors import StillgraphError
from stillgraph.manifest import File, GraphEntry
from stillgraph.messages import in_parts
from stillgraph.ports import input_ports, output_ports
from stillgraph.spec import GraphShape, ModelSpec, VisionSpec
from stillgraph.vision import features
from stillgraph.vision.embedder import Embedder
from stillgraph.vision.features import Vision
from tests.interrupts import interruptions

T, HIDDEN, IMAGE = 3, 2, 7
SPEC = VisionSpec(
    channels=1, height=2, width=2, image_tokens=T, image_token=IMAGE, mark="<image>", before="[", after="]"
)
MODEL = ModelSpec(
    architecture="Any", vocab_size=9, hidden_size=HIDDEN, num_attention_heads=1,
    max_position_embeddings=64, layers=(), vision=SPEC,
)  # fmt: skip


def entry(shape: GraphShape) -> GraphEntry:
    file = File(path="any.onnx", nbytes=0, sha256="0" * 64)
    inputs, outputs = input_ports(MODEL, shape), output_ports(MODEL, shape)
    return GraphEntry(shape=shape, file=file, inputs=inputs, outputs=outputs, aliases=())


class Pixels:
    """In place of a preprocessor: an image is a number, which all its pixels have."""

    def pixel_values(self, images: Sequence[int]) -> np.ndarray:
        return np.stack([np.full((1, 2, 2), image, np.float32) for image in images])


class Seer:
    """In place of a session; `seen` are the values of the pictures it ran over."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.loads = 0

    def load(self, entry: GraphEntry) -> Seer:
        self.loads += 1
        return self

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        def call() -> None:
            value = arrays["pixel_values"][0, 0, 0, 0]
            self.seen.append(float(value))
            arrays["image_features"][0] = value + np.arange(T, dtype=np.float32)[:, None]

        return call


def vision(seer: Seer, one_at_a_time: bool = False) -> Vision:
    graph, preprocessor = entry(GraphShape(role="vision", max_len=T)), Pixels()
    read: Any = lambda: preprocessor  # noqa: E731
    return Vision(SPEC, graph, read, seer.load, one_at_a_time)


def nothing() -> None: ...


IDS = [1, IMAGE, IMAGE, IMAGE, 2]


def rows_of(pictures: Vision, input_ids: list[int]) -> list[float]:
    rows = np.full((len(input_ids), HIDDEN), -1, np.float32)
    pictures.fill(input_ids, rows)
    return [float(value) for value in rows[:, 0]]


def test_marks_become_image_tokens() -> None:
    assert vision(Seer()).expanded("a<image>b<image>", "#") == "a[###]b[###]"


def test_features_take_the_places_of_their_tokens() -> None:
    pictures = vision(Seer())
    input_ids = pictures.place([*IDS, IMAGE, IMAGE, IMAGE], [10, 20])
    assert [input_id for input_id in input_ids if input_id >= 0] == [1, 2]
    assert len(set(input_ids)) == len(input_ids)
    pictures.see([input_ids], nothing)
    assert rows_of(pictures, input_ids) == [-1, 10, 11, 12, -1, 20, 21, 22]
    assert rows_of(pictures, input_ids[2:6]) == [11, 12, -1, 20]


def test_the_same_pixels_have_the_same_ids_and_are_seen_once() -> None:
    seer = Seer()
    pictures = vision(seer)
    first = pictures.place(IDS, [10])
    pictures.see([first], nothing)
    second = pictures.place(IDS, [20])
    assert second != first
    assert pictures.place(IDS, [10]) == first
    pictures.see([first, first], nothing)
    assert seer.seen == [10]


def test_pictures_of_former_requests_are_forgotten_and_can_come_again() -> None:
    seer = Seer()
    pictures = vision(seer)
    first, second = pictures.place(IDS, [10]), pictures.place(IDS, [20])
    for input_ids in (first, second):
        pictures.see([pictures.place(IDS, [10 if input_ids is first else 20])], nothing)
    assert len(pictures._features) == 1
    pictures.see([pictures.place(IDS, [10])], nothing)
    assert seer.seen == [10, 20, 10]
    assert rows_of(pictures, first)[1:4] == [10, 11, 12]


def test_a_text_without_pictures_needs_no_graph() -> None:
    pictures = Vision(SPEC, None, pytest.fail, pytest.fail)  # type: ignore[arg-type]
    assert pictures.place([1, 2], []) == [1, 2]
    pictures.see([[1, 2]], pytest.fail)  # type: ignore[arg-type]


def test_one_at_a_time_loads_when_others_have_left_and_leaves() -> None:
    seer, order = Seer(), list[str]()
    pictures = vision(seer, one_at_a_time=True)
    assert seer.loads == 0
    input_ids = pictures.place(IDS, [10])
    pictures.see([input_ids], lambda: order.append(f"released before {seer.loads}"))
    assert order == ["released before 0"]
    pictures.see([input_ids], pytest.fail)  # type: ignore[arg-type]
    assert seer.loads == 1
    assert pictures._call is None


@pytest.mark.parametrize(("images", "room"), [([], 1), ([1, 2], 1)])
def test_other_numbers_of_pictures(images: list[Any], room: int) -> None:
    with pytest.raises(StillgraphError, match=f"room for {room} pictures .* {len(images)} images"):
        vision(Seer()).place(IDS, images)


def test_an_image_token_too_many() -> None:
    with pytest.raises(StillgraphError, match=r"4 image tokens of 3 a picture"):
        vision(Seer()).place([*IDS, IMAGE], [1])


def test_pixels_of_another_size_than_the_graph_takes() -> None:
    class Other(Pixels):
        def pixel_values(self, images: Sequence[int]) -> np.ndarray:
            return np.zeros((len(images), 1, 2, 3), np.float32)

    pictures = Vision(SPEC, entry(GraphShape(role="vision", max_len=T)), Other, Seer().load)  # type: ignore[arg-type]
    with pytest.raises(StillgraphError, match=r"become \(1, 2, 3\) .* takes \(1, 2, 2\)"):
        pictures.place(IDS, [1])


def test_the_embedder_writes_where_the_prefill_reads() -> None:
    """A stand-in gives each id itself as its embedding; fill marks ids below zero."""

    class Table:
        def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
            def call() -> None:
                arrays["inputs_embeds"][:] = arrays["input_ids"][:, :, None]

            return call

    def fill(input_ids: Sequence[int], rows: np.ndarray) -> None:
        for index, input_id in enumerate(input_ids):
            if input_id < 0:
                rows[index] = 100 - input_id

    embedder = Embedder(entry(GraphShape(role="embed", batch=2, max_len=4)), lambda _: Table(), fill, T)
    embeddings, pictures = np.full((2, 4, HIDDEN), np.nan, np.float32), np.full((2, 4), 9)
    embedder.load(embeddings, pictures)
    embedder.run([[5, -2, 6], [8]])
    assert embeddings[:, :, 0].tolist() == [[5, 102, 6, 0], [8, 0, 0, 0]]
    embedder.load(embeddings, pictures)
    embedder.run([[5, -1, -2, -3], [-6, -1]])
    assert pictures.tolist() == [[0, 1, 1, 1], [1, 2, 0, 0]]
    embedder.run([[1], [2, 3]])
    assert embeddings[:, :, 0].tolist() == [[1, 0, 0, 0], [2, 3, 0, 0]]
    assert not pictures.any()


PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
    "{% endfor %}{% endfor %}"
)


def test_templates_of_parts_are_known() -> None:
    assert Template(PARTS, {}).takes_parts
    assert Template("{% if item['type'] == 'image' %}<start_of_image>{% endif %}", {}).takes_parts
    assert Template("{% if content.type == 'image' %}x{% endif %}", {}).takes_parts
    assert not Template("{% for m in messages %}{{ m.content }}{% endfor %}", {}).takes_parts


@pytest.mark.parametrize(
    ("content", "kinds"),
    [("a", ["a"]), ("<image>a", [None, "a"]), ("a<image><image>b", ["a", None, None, "b"]), ("", [])],
)
def test_contents_in_parts(content: str, kinds: list[str | None]) -> None:
    message = in_parts({"role": "user", "content": content}, "<image>")
    assert [part.get("text") for part in message["content"]] == kinds
    assert [part["type"] for part in message["content"]] == ["text" if kind else "image" for kind in kinds]


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_an_interrupt_leaves_no_picture_in_anothers_place(
    one_at_a_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "return_memory", nothing)  # it takes most of the time
    pictures, ids = vision(Seer(), one_at_a_time), [*IDS, IMAGE, IMAGE, IMAGE]

    def show(first: int, second: int) -> list[float]:
        input_ids = pictures.place(ids, [first, second])  # type: ignore[list-item]
        pictures.see([input_ids], nothing)
        return rows_of(pictures, input_ids)

    for where in interruptions(lambda: [show(10, 20), show(20, 30)]):
        assert show(20, 40) == [-1, 20, 21, 22, -1, 40, 41, 42], where
        assert show(10, 20) == [-1, 10, 11, 12, -1, 20, 21, 22], where
