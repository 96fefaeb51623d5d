"""The driver in JavaScript, in Node.js: tokens and texts are our engine's, over the same bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stillgraph.loading import load
from stillgraph.sampling import Sampling
from stillgraph.serve.packages import packages

ROOT = Path(__file__).parents[3]
NODE = shutil.which("node")
PAGE, DRIVER = ROOT / "runtime/serve/page", ROOT / "export/ship/drivers/node"
pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node.js")


def node(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(NODE), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    if not (found := packages("node")):
        pytest.skip("needs packages of npm, which .ci/run has it fetch")
    folder: Path = tmp_path_factory.mktemp("node")
    for path in (*PAGE.glob("*.js"), DRIVER / "generate.mjs", DRIVER / "package.json"):
        shutil.copyfile(path, folder / path.name)
    (folder / "node_modules").symlink_to(found / "node_modules")
    return folder


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    return load(tiny_bundle(), threads=1)


def generated(driver: Path, bundle: Path, *args: object) -> Any:
    done = node("generate.mjs", "--bundle", bundle, "--json", "--threads", 1, *args, cwd=driver)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "one token, past the window": ([7], {"max_new_tokens": 12}),
    "two chunks": ([7 + slot * slot % 200 for slot in range(17)], {"max_new_tokens": 8}),
    "to the last slot": ([9 + slot * 5 % 200 for slot in range(33)], {"max_new_tokens": 99}),
    "a text": ("Wie geht's, Bär? 日", {"max_new_tokens": 12, "repetition_penalty": 1.3}),
    "a chat": ([{"role": "user", "content": "hey"}], {"max_new_tokens": 10}),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_text_are_the_engines(driver, engine, name) -> None:
    prompt, options = CASES[name]
    steps = list(engine.stream(prompt, **options))
    given = (
        ["--token-ids", ",".join(map(str, prompt))] if isinstance(prompt[0], int) else ["--prompt", prompt]
    )
    if name == "a chat":
        given = ["--chat", "--prompt", prompt[0]["content"]]
    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    found = generated(driver, engine.bundle, *given, *flags)
    assert found["tokens"] == [step.token for step in steps]
    assert found["text"] == "".join(step.text for step in steps)
    assert found["finish_reason"] == steps[-1].finish_reason
    assert found["prompt_tokens"] == len(engine.ids(prompt))


@pytest.fixture(scope="module")
def seeing(tiny_bundle):
    return load(tiny_bundle(family="gemma3_vision"), threads=1)


def picture(place: Path, width: int, height: int, seed: int = 0) -> Path:
    """With holes that white shows through, as the engine has it of an image of Pillow."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(place)
    return place


def test_pictures_are_seen_as_the_engine_sees_them(driver, seeing, tmp_path) -> None:
    vision = seeing.manifest.model.vision
    one, two = (picture(tmp_path / f"{n}.png", vision.width, vision.height, n) for n in range(2))
    asked = [{"role": "user", "content": f"{vision.mark}\nhey"}]
    expected = [step.token for step in seeing.stream(asked, images=[Image.open(one)], max_new_tokens=6)]
    chat = ["--chat", "--prompt", "hey", "--image", one, "--max-new-tokens", 6]
    assert generated(driver, seeing.bundle, *chat)["tokens"] == expected
    marks = [vision.image_token] * vision.image_tokens
    ids = [2, 9, *marks, 8, *marks, 30]
    found = []
    for images in ([one, two], [two, one]):  # a chunk is 16 tokens: each is in one of its own
        opened = [Image.open(image) for image in images]
        expected = [step.token for step in seeing.stream(ids, images=opened, max_new_tokens=6)]
        given = [word for image in images for word in ("--image", image)]
        words = ["--token-ids", ",".join(map(str, ids)), "--max-new-tokens", 6, *given]
        assert generated(driver, seeing.bundle, *words)["tokens"] == expected
        found.append(expected)
    assert found[0] != found[1]


def test_a_picture_that_does_not_fit_is_one_sentence(driver, seeing, tmp_path) -> None:
    vision = seeing.manifest.model.vision
    wide = picture(tmp_path / "wide.png", vision.width + 1, vision.height)
    right = picture(tmp_path / "right.png", vision.width, vision.height)
    ids = ",".join(map(str, [2, *[vision.image_token] * vision.image_tokens]))
    for words, given in (
        (
            f"{vision.width + 1} x {vision.height} pixels and the model takes",
            ("--prompt", "a", "--image", wide),
        ),
        ("room for 1 pictures and 0 are given", ("--token-ids", ids)),
        ("room for 1 pictures and 2 are given", ("--token-ids", ids, "--image", right, "--image", right)),
    ):
        done = node("generate.mjs", "--bundle", seeing.bundle, *given, cwd=driver)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


FRAMES = [
    ((640, 480), {"size": [24, 24], "crop": None}, [0, 0, 640, 480]),
    ((640, 480), {"size": 24, "crop": [24, 24]}, [80, 0, 480, 480]),
    ((480, 640), {"size": 30, "crop": [24, 24]}, [48, 128, 384, 384]),
    ((640, 480), {"size": [24, 32], "crop": [12, 16]}, [160, 120, 320, 240]),
]


@pytest.mark.parametrize(("size", "steps", "expected"), FRAMES)
def test_the_middle_is_cut_out_as_a_processor_does(tmp_path, size, steps, expected) -> None:
    script = f"""import {{ frame }} from {json.dumps((PAGE / "pictures.js").as_uri())};
console.log(JSON.stringify(Object.values(frame({size[0]}, {size[1]}, {json.dumps(steps)}))));"""
    (tmp_path / "frame.mjs").write_text(script)
    assert json.loads(node("frame.mjs", cwd=tmp_path).stdout) == pytest.approx(expected)


def test_a_stop_text_ends_it(driver, engine) -> None:
    whole = "".join(step.text for step in engine.stream([7], max_new_tokens=12))
    stop = whole[3:5]
    found = generated(driver, engine.bundle, "--token-ids", 7, "--max-new-tokens", 12, "--stop", stop)
    assert (found["text"], found["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_what_it_cannot_use_is_one_sentence(driver, engine, tmp_path) -> None:
    other = json.loads((engine.bundle / "manifest.json").read_text()) | {"format_version": 99}
    (tmp_path / "manifest.json").write_text(json.dumps(other))
    for bundle, prompt, words in (
        (tmp_path / "none", "a", "no manifest.json"),
        (tmp_path, "a", "format version 99 and this driver understands"),
        (engine.bundle, "a" * 50, "has 51 tokens and the bundle takes 40"),
    ):
        done = node("generate.mjs", "--bundle", bundle, "--prompt", prompt, cwd=driver)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


SAMPLINGS = [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.7, "min_p": 0.1}]


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
def test_tokens_are_drawn_from_what_python_keeps(tmp_path, options) -> None:
    """And as often: of 4000 draws each share is within five standard deviations of its probability."""
    logits = np.random.default_rng(3).normal(0, 0.7, 40).astype(np.float32)
    scores, ids = logits, [1, 2]
    for process in Sampling(temperature=0.8, repetition_penalty=1.2, **options).processors():
        scores = process(scores, ids)
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    assert np.count_nonzero(expected) > 2  # else any cut would do
    names = {"top_k": "topK", "top_p": "topP", "min_p": "minP"}
    given = {"temperature": 0.8, "repetitionPenalty": 1.2, "seed": 5}
    given |= {names[key]: value for key, value in options.items()}
    script = f"""import {{ sampler }} from {json.dumps((PAGE / "sampling.js").as_uri())};
const logits = Float32Array.from({json.dumps(logits.tolist())}), choose = sampler({json.dumps(given)});
console.log(JSON.stringify(Array.from({{ length: 4000 }}, () => choose(logits, [1, 2]))));"""
    (tmp_path / "draw.mjs").write_text(script)
    drawn = json.loads(node("draw.mjs", cwd=tmp_path).stdout)
    share = np.bincount(drawn, minlength=40) / 4000
    assert set(np.flatnonzero(share)) <= set(np.flatnonzero(expected))
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()
