"""What the README says can be typed, can be typed; what it says is there, is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("export/**/README.md")),
    ROOT / "runtime/README.md",
    *sorted(ROOT.glob("tests/**/README.md")),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = [
    command
    for text in TEXTS.values()
    for command in re.findall(r"^    (?:\$ )?(stillgraph .*?)(?:  #.*)?$", text, re.MULTILINE)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_their_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    help_text = help_of(*(words[:2] if words[0] == "export" else words[:1]))
    for option in (word for word in words if word.startswith("-")):
        assert option in help_text


@cache
def help_of(*verbs: str) -> str:
    command = [sys.executable, "-m", "stillgraph", *verbs, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        assert target.startswith("http") or (ROOT / page).parent.joinpath(target).exists(), target


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 120


def test_make_targets_exist() -> None:
    targets = re.findall(r"`?make (\w+)", README)
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_files_of_the_tree_exist() -> None:
    tree = README.partition("## Where things are")[2].partition("A token's way")[0]
    folder, seen = ROOT, 0
    for line in filter(str.strip, tree.splitlines()):
        if top := re.match(r"    (\w+/)", line):
            folder = ROOT / top[1]
            assert folder.is_dir()
        for name in re.findall(r"(\w+\.py)", line):
            seen += 1
            assert (folder / name).is_file() or list(folder.glob(f"*/{name}")), f"{folder.name}/{name}"
    assert seen > 20


def python_of(page: str) -> str:
    """The Python on a page, as one program."""
    return "\n".join(re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL))


def test_the_python_examples_run(tmp_path: Path) -> None:
    from stillgraph.exporter.bundle.build import export
    from stillgraph.exporter.config import decode_shape, prefill_shape, request

    config = request(
        model="demo", target="portable", precision="fp32", batch=1, out=tmp_path / "artifacts/demo"
    )
    export(config, [prefill_shape(config, 128, 1024), decode_shape(config, 1024)], True, lambda _: None)
    for page in ("README.md", "runtime/README.md"):
        command = [sys.executable, "-c", python_of(page)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert len(done.stdout.split()) > 20
