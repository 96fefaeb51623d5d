"""The tables and texts of both real models that stand in the repository, by one command after `make real`.

    python -m tests.real.report

`validate --table` of the fp32, int8 and int4 bundles, as export/validate/<model>.md; and what fp32 and int4
say to twenty prompts, greedily, with counts of what they say again, as tests/real/texts.md: SmolLM2 answers a
chat, Gemma 3 270M, which is not trained to answer, goes on with a text.
"""

from __future__ import annotations

import html
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import stillgraph
from stillgraph import Engine
from tests.real.fetch import PLACE

ROOT = Path(__file__).parents[2]
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
TABLES = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}
BUNDLES = ("fp32", "int8", "int4")
TOKENS = 48
RUN, LOOP = 4, 0.3  # tokens, and the share of runs said before that makes an answer one that loops
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "What is a prime number?",
    "Who wrote Romeo and Juliet?",
    "Explain gravity to a child.",
    "What does a compiler do?",
    "How many days has a week?",
    "Give me a tip for better sleep.",
    "What is photosynthesis?",
    "Translate 'good morning' into Spanish.",
    "What is the largest planet of the solar system?",
    "Write a sentence about the sea.",
    "What is the difference between a list and a tuple in Python?",
    "Why do leaves fall in autumn?",
    "What is the boiling point of water?",
    "Summarize: The cat sat on the mat because it was warm there.",
    "How does a bicycle stay upright?",
    "What is democracy?",
)
SUBJECTS = """a volcano, democracy, a neuron, the Internet, bread, an atom, jazz, a glacier, the moon,
a library, gravity, a virus, inflation, a desert, the heart, an engine, a whale, chess, electricity, a bridge,
rice, a comet, the alphabet, a rainbow, a battery, sleep, a river, a telescope, football, a seed"""
FORMS = ("What is {}?", "Explain {} to a child.", "Write two sentences about {}.", "Why is {} important?")
BEGINNINGS = (
    "The capital of France is",
    "Three fruits that grow on trees are",
    "The sky is blue because",
    "To boil an egg, first",
    "A prime number is",
    "Romeo and Juliet was written by",
    "Gravity is the force that",
    "A compiler is a program that",
    "There are seven days in a week:",
    "To sleep better at night,",
    "Photosynthesis is the process by which",
    "The Spanish words for the numbers from one to five are",
    "The largest planet of the solar system is",
    "The sea was calm that morning, and",
    "In Python, the difference between a list and a tuple is",
    "In autumn, leaves fall because",
    "Water boils at",
    "Once upon a time, in a small village,",
    "A bicycle stays upright because",
    "Democracy is a form of government in which",
)


@dataclass(frozen=True)
class Answer:
    """Ids of a prompt, ids of what came after it, and that as text."""

    prompt: list[int]
    ids: list[int]
    text: str


def answers(engine: Engine, prompts: tuple[str, ...], chat: bool) -> Iterator[Answer]:
    for prompt in prompts:
        given = engine.ids([{"role": "user", "content": prompt}] if chat else prompt)
        steps = list(engine.stream(given, max_new_tokens=TOKENS))
        yield Answer(given, [step.token for step in steps], "".join(step.text for step in steps))


def surprise(engine: Engine, found: Sequence[Answer]) -> float:
    """Nats that a token of the answers surprises a model by: the mean of -log p, each after those before."""
    scored = [
        -step.logprob
        for one in found
        for step in engine.score([*one.prompt, *one.ids], start=len(one.prompt))
    ]
    return sum(scored) / len(scored)


def repeated(found: Sequence[Sequence[int]]) -> float:
    """The share of runs of `RUN` tokens that were in the same answer before."""
    runs = [[tuple(ids[at : at + RUN]) for at in range(len(ids) - RUN + 1)] for ids in found]
    return sum(len(each) - len(set(each)) for each in runs) / sum(map(len, runs))


def loops(name: str) -> str:
    """How many answers of each bundle say mostly the same again, of more questions than anyone reads."""
    subjects = SUBJECTS.replace("\n", " ").split(", ")
    prompts = tuple(form.format(subject) for subject in subjects for form in FORMS)
    counts = []
    for bundle in BUNDLES:
        with stillgraph.load(PLACE / name / bundle) as engine:
            found = [one.ids for one in answers(engine, prompts, chat=True)]
        counts.append(sum(len(ids) >= RUN and repeated([ids]) > LOOP for ids in found))
    told = ", ".join(f"{count} of {bundle}'s" for count, bundle in zip(counts, BUNDLES, strict=True))
    begin = f"Of the answers to {len(prompts)} more questions, more than {LOOP:.0%} of such runs came before"
    return f"{begin}\nin {told}."


def in_cell(text: str) -> str:
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def table(name: str, prompts: tuple[str, ...], chat: bool) -> str:
    with stillgraph.load(PLACE / name / "int4") as engine:
        int4 = list(answers(engine, prompts, chat))
    with stillgraph.load(PLACE / name / "fp32") as engine:
        fp32 = list(answers(engine, prompts, chat))
        nats = [surprise(engine, found) for found in (fp32, int4)]
    again = [repeated([one.ids for one in found]) for found in (fp32, int4)]
    told = (
        f"A token of its own answers surprises the fp32 model by {nats[0]:.2f} nats, one of int4's by\n"
        f"{nats[1]:.2f}. Of runs of {RUN} tokens {again[0]:.1%} came before in the same answer at fp32,\n"
        f"{again[1]:.1%} at int4."
    )
    pairs = zip(prompts, fp32, int4, strict=True)
    rows = [f"| {prompt} | {in_cell(one.text)} | {in_cell(other.text)} |" for prompt, one, other in pairs]
    return "\n".join([told, "", "| prompt | fp32 | int4 |", "|---|---|---|", *rows])


def write_table(name: str) -> None:
    """Raises CalledProcessError where a bundle fails its validation."""
    bundles = [str(PLACE / name / bundle) for bundle in BUNDLES]
    table = ROOT / "export" / "validate" / f"{TABLES[name]}.md"
    command = [sys.executable, "-m", "stillgraph", "validate", *bundles, "--quick", "--table", str(table)]
    subprocess.run(command, check=True)
    _, rest = table.read_text(encoding="utf-8").split("\n", 1)  # the heading is the name of a folder
    table.write_text(f"# {TITLES[name]}\n{rest}", encoding="utf-8")


def write_texts() -> None:
    head = (
        "# What fp32 and int4 say\n\n"
        f"The first {TOKENS} tokens, greedily, of the default exports of two real models, whose\n"
        "weights were moved off the grids of the GGUF files that they come from. Made by\n"
        "`python -m tests.real.report` after `make real`."
    )
    parts = [
        head,
        "## SmolLM2-135M-Instruct, a chat",
        table("smollm2", QUESTIONS, chat=True),
        loops("smollm2"),
        "## Gemma 3 270M, a text that goes on",
        table("gemma3", BEGINNINGS, chat=False),
    ]
    Path(__file__).with_name("texts.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_texts()
    for model in TABLES:
        write_table(model)
