"""Drawn pictures of colored shapes, and questions about them with one right answer each.

    python -m stillgraph.exporter.demo.scenes scene.png [--seed 0]

draws one that no training saw, and prints what can be asked about it.

Everything is determined by a seed. One tenth of all scenes is held out: no training picture shows one of
them, so a right answer to a held-out picture was read from it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 205, 40),
    "purple": (140, 60, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NUMBERS = "None One Two Three Four Five".split()
MOST = 5  # shapes of a scene
CELLS = 3  # a side
CONTENTS = 1 + len(SHAPES) * len(COLORS)  # of a cell: nothing, or a shape of a color
OVERSAMPLING = 4  # of edges, which are smooth as in a photograph


@dataclass(frozen=True, order=True)
class Thing:
    """One shape; row and column of its cell, from the top left."""

    row: int
    column: int
    shape: str
    color: str

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question about a scene and its whole right answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Shapes in different cells of a grid, in reading order."""

    things: tuple[Thing, ...]

    @property
    def held_out(self) -> bool:
        """Whether no training picture shows it."""
        return crc32(repr(self.things).encode()) % 10 == 0

    @property
    def cells(self) -> list[int]:
        """What is in each cell, in reading order: 0 for nothing, below CONTENTS."""
        found = [0] * CELLS**2
        for thing in self.things:
            kind = SHAPES.index(thing.shape) * len(COLORS) + list(COLORS).index(thing.color)
            found[thing.row * CELLS + thing.column] = 1 + kind
        return found

    def draw(self, rng: random.Random, side: int) -> Image.Image:
        """The scene as RGB of side x side pixels; sizes, places in the cells and background vary."""
        ground = tuple(rng.randint(225, 255) for _ in range(3))
        whole = side * OVERSAMPLING
        image = Image.new("RGB", (whole, whole), ground)
        pen, cell = ImageDraw.Draw(image), whole / CELLS
        for thing in self.things:
            radius = cell * rng.uniform(0.3, 0.44)
            x, y = (
                (at + 0.5) * cell + (cell / 2 - radius) * rng.uniform(-0.9, 0.9)
                for at in (thing.column, thing.row)
            )
            box = x - radius, y - radius, x + radius, y + radius
            color = tuple(min(255, max(0, part + rng.randint(-20, 20))) for part in COLORS[thing.color])
            if thing.shape == "circle":
                pen.ellipse(box, fill=color)
            elif thing.shape == "square":
                pen.rectangle(box, fill=color)
            else:
                pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=color)
        return image.resize((side, side), Image.Resampling.BOX)

    def questions(self, rng: random.Random) -> list[Question]:
        """One of each kind that the scene answers, in any order."""
        things = self.things
        shapes = Counter(thing.shape for thing in things)
        colors = Counter(thing.color for thing in things)
        names = Counter(thing.name for thing in things)
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        asked = [
            Question("How many shapes are there?", f"{NUMBERS[len(things)]}."),
            Question(f"How many {shape}s are there?", f"{NUMBERS[shapes[shape]]}."),
            Question(f"How many {color} shapes are there?", f"{NUMBERS[colors[color]]}."),
            self._is_there(rng, names),
            self._what_is_at(rng),
        ]
        if single := [thing for thing in things if shapes[thing.shape] == 1]:
            thing = rng.choice(single)
            asked.append(Question(f"What colour is the {thing.shape}?", f"{thing.color.capitalize()}."))
        if single := [thing for thing in things if colors[thing.color] == 1]:
            thing = rng.choice(single)
            asked.append(Question(f"Which shape is {thing.color}?", f"The {thing.shape}."))
        if single := [thing for thing in things if names[thing.name] == 1]:
            thing = rng.choice(single)
            asked.append(Question(f"Where is the {thing.name}?", f"At the {thing.place}."))
        return rng.sample(asked, len(asked))

    def _is_there(self, rng: random.Random, names: Counter[str]) -> Question:
        if rng.random() < 0.5:
            name = rng.choice(self.things).name
        else:
            name = f"{rng.choice(list(COLORS))} {rng.choice(SHAPES)}"
        return Question(f"Is there a {name}?", "Yes." if names[name] else "No.")

    def _what_is_at(self, rng: random.Random) -> Question:
        there = {thing.place: thing.name for thing in self.things}
        if rng.random() < 0.7:
            place = rng.choice(list(there))
        else:
            place = rng.choice([place for row in PLACES for place in row])
        answer = f"A {there[place]}." if place in there else "Nothing."
        return Question(f"What is at the {place}?", answer)


def scenes(seed: str, held_out: bool) -> Iterator[Scene]:
    """An endless stream of scenes, all held out or none of them."""
    rng = random.Random(f"scenes {seed}")
    cells = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    while True:
        taken = rng.sample(cells, rng.randint(1, MOST))
        things = [Thing(*cell, rng.choice(SHAPES), rng.choice(list(COLORS))) for cell in taken]
        scene = Scene(tuple(sorted(things)))
        if scene.held_out is held_out:
            yield scene


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=192, help="in pixels")
    args = parser.parse_args()
    rng, scene = random.Random(args.seed), next(scenes(f"drawn {args.seed}", held_out=True))
    scene.draw(rng, args.side).save(args.picture)
    for question in scene.questions(rng):
        print(f"{question.text}  {question.answer}")


if __name__ == "__main__":
    main()
