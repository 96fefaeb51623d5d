"""The bundles of the shipped demo that the trials are about, and the tokens that each must give."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

from stillgraph import load
from stillgraph.engine import Engine
from tests.faults.batch import ROOT, environment

FOLDER = ROOT / "artifacts" / "faults"
EXPECTED = FOLDER / "expected.json"
INT4 = "--precision int4 --target onnxruntime"
EXPORTS = {
    "int4": f"bundle -m demo {INT4}",
    "fp32": "bundle -m demo",
    "growing": "dynamic -m demo",
    "rows": "bundle -m demo --batch 2",
    "seeing": "bundle -m demo-vision",
}
COUNT = 12  # tokens of an answer
STORY = "Once upon a time there was a little boat. Every day it went out to sea and came home. "
PROMPTS = [
    STORY * 16,  # three chunks
    "The dog saw a big red ball. " * 40,
    "Once upon a time",
    "Tom and Lily went to the park.",
]
CHAT = [{"role": "user", "content": "Tell me about a boat."}]
QUESTION = {"type": "text", "text": "How many shapes are there?"}
SEEN = [{"role": "user", "content": [{"type": "image"}, QUESTION]}]
SCENE = ROOT / "export" / "demo" / "demo_vision_checkpoint" / "scene.png"
Answer = list[list[float]]  # of each token its id and its log-probability


def make() -> None:
    """The bundles that are not there yet, and the answers of each, again."""
    for name, arguments in EXPORTS.items():
        place = FOLDER / name
        if (place / "manifest.json").is_file():
            continue
        validate = ["--no-validate"] if arguments.startswith("bundle") else []
        command("export", *arguments.split(), *validate, "--quiet", "--out", str(place))
        if name == "int4":
            command("compile", str(place))
    found = {
        f"{name} {kind}": json.loads(_fresh(name, kind))
        for name in EXPORTS
        for kind in (["compiled", "plain"] if name == "int4" else ["plain"])
    }
    EXPECTED.write_text(json.dumps(found), encoding="ascii")


def command(*arguments: str) -> None:
    """Raises subprocess.CalledProcessError."""
    subprocess.run(
        [sys.executable, "-m", "stillgraph", *arguments],
        check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip


@cache
def expected(name: str, kind: str = "plain") -> list[Answer]:
    """Of a bundle, the answers to PROMPTS, and after them to the chat, of a picture where it sees."""
    answers: dict[str, list[Answer]] = json.loads(EXPECTED.read_text(encoding="ascii"))
    return answers[f"{name} {kind}"]


def answer(engine: Engine, index: int, count: int = COUNT, **options: Any) -> Answer:
    """An engine's answer to the prompt of an index in `expected`."""
    prompt: Any = [*PROMPTS, SEEN if engine.vision else CHAT][index]
    if engine.vision and isinstance(prompt, str):
        prompt = prompt[:300]  # of a tokenizer of letters
    images = [SCENE] if engine.vision and index == len(PROMPTS) else []
    steps = engine.stream(prompt, max_new_tokens=count, stop_tokens=(), images=images, **options)
    return [[step.token, step.logprob] for step in steps]


def tokens(found: Answer) -> list[int]:
    return [int(token) for token, _ in found]


def open_(name: str, **options: Any) -> Engine:
    return load(FOLDER / name, threads=1, **options)


def _fresh(name: str, kind: str) -> str:
    arguments = [sys.executable, "-m", "tests.faults.subjects", name, kind]
    done = subprocess.run(
        arguments, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    return done.stdout


def _answers(name: str, kind: str) -> list[Answer]:
    """Each by an engine of its own."""
    found = []
    for index in range(len(PROMPTS) + 1):
        with open_(name, compiled=kind == "compiled") as engine:
            found.append(answer(engine, index))
    return found


if __name__ == "__main__":
    print(json.dumps(_answers(*sys.argv[1:])))
