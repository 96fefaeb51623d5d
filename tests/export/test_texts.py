"""A user's texts: what can be measured over is read, and all else is refused in one sentence."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stillgraph
from stillgraph.exporter.checkpoint_folder import DEMO
from stillgraph.exporter.texts.passages import default_texts, read_texts

WRONG: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "No such file"),
    "empty": (b"", "0 characters"),
    "blank": (b" \n" * 3000, "0 characters"),
    "tiny": (b"Once upon a time.", "17 characters"),
    "binary": (b"\x89PNG\r\n" * 400, "byte 0"),
    "zeros": (b"a\0" * 2000, "zero byte"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_text_that_says_nothing_is_refused(name: str, tmp_path: Path, refused: Callable[..., Any]) -> None:
    content, said = WRONG[name]
    path = tmp_path / "own.txt"
    if content is not None:
        path.write_bytes(content)
    with refused("read text", "own.txt", said):
        read_texts([path])
    with refused("read text", "own.txt", said):
        stillgraph.export("demo", tmp_path / "out", text=[path])
    assert not (tmp_path / "out").exists()


def test_a_folder_is_refused(tmp_path: Path, refused: Callable[..., Any]) -> None:
    with refused("read text", tmp_path.name):
        read_texts([tmp_path])


def test_a_text_without_a_validation_is_refused(tmp_path: Path, refused: Callable[..., Any]) -> None:
    with refused("export", "--text", "--no-validate"):
        stillgraph.export("demo", tmp_path / "out", text="own.txt", validate=False)


def test_a_text_is_read_as_it_is_and_once(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "Tide table, h\u00f6chste\n".encode() * 60)
    (text,) = read_texts([path, path])
    assert text.name == "own.txt"
    assert text.passages == ("Tide table, h\u00f6chste\n" * 60,)
    assert text.sha256 == hashlib.sha256(text.passages[0].encode()).hexdigest()


def test_a_wrong_text_is_told_of_before_torch_is_imported(tmp_path: Path) -> None:
    options = ["export", "bundle", "--out", str(tmp_path / "out"), "--text", "nowhere.txt"]
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['stillgraph', *{options}]"
    code += "; from stillgraph.cli import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "read text: nowhere.txt: No such file or directory" in found.stderr


def test_texts_that_ship_are_of_the_model() -> None:
    assert [text.name for text in default_texts(DEMO)] == ["held-out stories"]
    shipped = default_texts(DEMO / "another")
    assert [text.name for text in shipped] == ["prose.txt", "code.txt"]
    assert read_texts([Path(stillgraph.__file__).parent / "exporter/texts/prose.txt"]) == shipped[:1]
