"""Drawn scenes: what is drawn is what is asked for, and held-out scenes are never trained on."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from stillgraph.exporter.demo.scenes import CELLS, COLORS, CONTENTS, SHAPES, Scene, Thing, scenes

SCENE = Scene((Thing(0, 0, "circle", "red"), Thing(1, 2, "circle", "blue"), Thing(2, 1, "square", "red")))


def asked(scene: Scene) -> dict[str, str]:
    """Every question that comes up in many askings, and its answer."""
    rng, found = random.Random(0), dict[str, str]()
    for _ in range(300):
        for question in scene.questions(rng):
            assert found.setdefault(question.text, question.answer) == question.answer
    return found


def test_questions_have_the_right_answers() -> None:
    found = asked(SCENE)
    expected = {
        "How many shapes are there?": "Three.",
        "How many circles are there?": "Two.",
        "How many triangles are there?": "None.",
        "How many red shapes are there?": "Two.",
        "What colour is the square?": "Red.",
        "Which shape is blue?": "The circle.",
        "Where is the blue circle?": "At the right.",
        "Where is the red square?": "At the bottom.",
        "Is there a red circle?": "Yes.",
        "Is there a blue square?": "No.",
        "What is at the top left?": "A red circle.",
        "What is at the middle?": "Nothing.",
    }
    assert {text: found.get(text) for text in expected} == expected


def test_nothing_ambiguous_is_asked() -> None:
    found = asked(SCENE)
    assert "What colour is the circle?" not in found
    assert "Which shape is red?" not in found
    twins = asked(Scene((Thing(0, 0, "circle", "red"), Thing(0, 1, "circle", "red"))))
    assert not [text for text in twins if text.startswith(("Where", "What colour", "Which"))]


def test_cells_say_what_is_where() -> None:
    cells = SCENE.cells
    assert [index for index, content in enumerate(cells) if content] == [0, 5, 7]
    assert max(cells) < CONTENTS == 1 + len(SHAPES) * len(COLORS)
    assert len({cells[0], cells[5], cells[7]}) == 3


@pytest.mark.parametrize("side", [64, 100])
def test_shapes_are_drawn_in_their_cells(side: int) -> None:
    """The pixel in the middle of a cell has the color of what is there; the shape covers what it should."""
    image = np.asarray(SCENE.draw(random.Random(1), side)).astype(int)
    assert image.shape == (side, side, 3)
    cell = side / CELLS
    for thing in SCENE.things:
        middle = image[int((thing.row + 0.5) * cell), int((thing.column + 0.5) * cell)]
        assert np.abs(middle - COLORS[thing.color]).max() <= 20
    assert image[int(0.5 * cell), int(2.5 * cell)].min() >= 225  # nothing at the top right


def test_held_out_scenes_are_others() -> None:
    trained, held = (set(islice(scenes("a", held_out), 500)) for held_out in (False, True))
    assert not trained & held
    assert all(scene.held_out for scene in held)
    assert list(islice(scenes("a", True), 5)) == list(islice(scenes("a", True), 5))
    assert {len(scene.things) for scene in trained} == {1, 2, 3, 4, 5}
