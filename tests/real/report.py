"""The tables and texts of both real models that stand in the repository, by one command after `make real`.

    python -m tests.real.report

`validate --table` of the fp32, int8 and int4 bundles, as export/validate/<model>.md; and what fp32 and int4
say to twenty prompts, greedily, as tests/real/texts.md: SmolLM2 answers a chat, Gemma 3 270M, which is not
trained to answer, goes on with a text.
"""

from __future__ import annotations

import html
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import stillgraph
from stillgraph import Engine
from tests.real.fetch import PLACE

ROOT = Path(__file__).parents[2]
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
TABLES = {"smollm2": "smollm2-135m", "gemma3": "gemma-3-270m"}
BUNDLES = ("fp32", "int8", "int4")
TOKENS = 48
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


def texts(engine: Engine, prompts: tuple[str, ...], chat: bool) -> Iterator[str]:
    """A line of text for each prompt."""
    for prompt in prompts:
        given = [{"role": "user", "content": prompt}] if chat else prompt
        steps = engine.stream(given, max_new_tokens=TOKENS)
        words = html.escape("".join(step.text for step in steps), quote=False).replace("|", "\\|").split()
        yield " ".join(words)


def table(name: str, prompts: tuple[str, ...], chat: bool) -> str:
    columns = []
    for precision in ("fp32", "int4"):
        with stillgraph.load(PLACE / name / precision) as engine:
            columns.append(list(texts(engine, prompts, chat)))
    rows = [f"| {' | '.join(row)} |" for row in zip(prompts, *columns, strict=True)]
    return "\n".join(["| prompt | fp32 | int4 |", "|---|---|---|", *rows])


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
        "## Gemma 3 270M, a text that goes on",
        table("gemma3", BEGINNINGS, chat=False),
    ]
    Path(__file__).with_name("texts.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_texts()
    for model in TABLES:
        write_table(model)
