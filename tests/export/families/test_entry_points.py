"""Families that another installed package brings: a made-up distribution on sys.path."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.families import families

Refused = Callable[..., AbstractContextManager[None]]
STAGE = "find model families"
OWN = """
from dataclasses import replace
from stillgraph.exporter.families.llama import FAMILY as LLAMA

FAMILY = replace(LLAMA, architecture="MadeUpForCausalLM")
AGAIN = replace(LLAMA)
NUMBER = 7
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """A distribution `made-up` with one module and one entry point."""
    info = folder / "made_up-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[stillgraph.families]\nmine = {entry}\n")
    name = entry.partition(":")[0]
    (folder / f"{name}.py").write_text("import no_such_library\n" if "broken" in name else OWN)
    monkeypatch.syspath_prepend(folder)


def test_a_family_of_another_package(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    checkpoint = tiny_checkpoint(family="llama")
    config = (checkpoint / "config.json").read_text()
    own = tmp_path / "own"
    own.mkdir()
    for path in checkpoint.iterdir():
        (own / path.name).symlink_to(path)
    (own / "config.json").unlink()
    (own / "config.json").write_text(config.replace("LlamaForCausalLM", "MadeUpForCausalLM"))
    with refused("read checkpoint", "'MadeUpForCausalLM' is not supported", "LlamaForCausalLM"):
        open_checkpoint(str(own))
    install(tmp_path / "site", monkeypatch, "made_up_good:FAMILY")
    assert open_checkpoint(str(own)).family.architecture == "MadeUpForCausalLM"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("made_up_twice:AGAIN", ("has a family for LlamaForCausalLM", "uninstall made-up")),
        ("made_up_broken:FAMILY", ("cannot be loaded (ModuleNotFoundError", "fix or uninstall made-up")),
        ("made_up_other:NUMBER", ("is a int", "point it at a Family")),
        ("made_up_lacking:MINE", ("cannot be loaded (AttributeError", "fix or uninstall made-up")),
    ],
)
def test_one_sentence_for_an_entry_point_that_is_no_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, entry: str, words: tuple[str, ...]
) -> None:
    install(tmp_path / "site", monkeypatch, entry)
    with refused(STAGE, f"entry point mine = {entry} of made-up", *words):
        families()
