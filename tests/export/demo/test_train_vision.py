"""The demo that sees: right answers about pictures it was not trained on, and wrong ones of wrong pixels."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
from PIL import Image, ImageOps

from stillgraph import load
from stillgraph.engine import Engine
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint_folder import SHIPPED
from stillgraph.exporter.config import decode_shape, prefill_shape, request
from stillgraph.exporter.demo.scenes import scenes

PICTURES = 25


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    out = tmp_path_factory.mktemp("demo") / "demo-vision"
    config = request(model="demo-vision", target="onnxruntime", precision="fp32", batch=1, out=out)
    shapes = [prefill_shape(config, 64, 256), decode_shape(config, 256)]
    export(config, shapes, replace=True, say=lambda line: None, vision=None)
    return load(out, threads=2)


def score(engine: Engine, change: Callable[[Image.Image], Image.Image]) -> float:
    """The share of all questions about held-out pictures that are answered right, word for word."""
    rng, right, total = random.Random("test"), 0, 0
    for scene in islice(scenes("test", held_out=True), PICTURES):
        image = change(scene.draw(rng, rng.randint(80, 240)))
        for question in scene.questions(rng):
            prompt = engine.ids([engine.prompts.user(question.text, 1)])
            steps = engine.stream(prompt, images=[image], max_new_tokens=12)
            right += "".join(step.text for step in steps) == question.answer
            total += 1
    return right / total


def swapped(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (blue, green, red))


def test_answers_are_right(engine: Engine) -> None:
    assert score(engine, lambda image: image) >= 0.9


@pytest.mark.parametrize("change", [swapped, ImageOps.flip, ImageOps.invert])
def test_wrong_pixels_give_wrong_answers(engine: Engine, change: Any) -> None:
    assert score(engine, change) <= 0.75


def test_it_is_small_enough_to_ship() -> None:
    folder = SHIPPED["demo-vision"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
