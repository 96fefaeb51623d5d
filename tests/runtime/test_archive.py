"""Archives: the same bytes for the same folder, and no hostile one writes anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillgraph.archive import CONTENTS, pack, unpack
from stillgraph.cli import main

FILES = {"a/weights.data": b"\x00" * 70000 + b"end", "manifest.json": b"{}", "z.txt": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def contents(files: dict[str, bytes], **changed: Any) -> bytes:
    listed = [
        {"path": name, "nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    return json.dumps({"format_version": 1, "runtime": "ort", "files": listed} | changed).encode()


def archive_of(place: Path, members: list[tuple[tarfile.TarInfo | str, bytes]]) -> Path:
    path = place / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def everything(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*")}


def test_what_is_packed_is_unpacked(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "one.tar", "ort")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    (folder / "z.txt").chmod(0o600)
    pack(folder, tmp_path / "other.tar", "ort")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "other.tar").read_bytes()
    assert main(["unpack", str(tmp_path / "one.tar"), "--out", str(tmp_path / "out")]) == 0
    found = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    assert {name: path.read_bytes() for name, path in found.items() if path.is_file()} == FILES
    with tarfile.open(tmp_path / "one.tar") as tar:  # which other tools can read
        assert tar.getnames() == [CONTENTS, *sorted(FILES)]


GOOD = {"a": b"1"}
HOSTILE: dict[str, tuple[list[tuple[Any, bytes]], str]] = {
    "parent": ([(CONTENTS, contents({"../x": b"1"})), ("../x", b"1")], "leaves the bundle"),
    "inner parent": ([(CONTENTS, contents({"a/../../x": b"1"})), ("a/../../x", b"1")], "leaves the bundle"),
    "absolute": ([(CONTENTS, contents({"/x": b"1"})), ("/x", b"1")], "leaves the bundle"),
    "drive": ([(CONTENTS, contents({"c:/x": b"1"})), ("c:/x", b"1")], "may leave the folder"),
    "unlisted parent": ([(CONTENTS, contents(GOOD)), ("../x", b"1")], "has '../x'"),
    "more": ([(CONTENTS, contents(GOOD)), ("a", b"1"), ("../x", b"1")], "'../x', which it does not list"),
    "link": ([(CONTENTS, contents(GOOD)), (special("a", tarfile.SYMTYPE, "/etc"), b"")], "a link to '/etc'"),
    "hard link": ([(CONTENTS, contents(GOOD)), (special("a", tarfile.LNKTYPE, "b"), b"")], "a link to 'b'"),
    "device": ([(CONTENTS, contents(GOOD)), (special("a", tarfile.CHRTYPE), b"")], "is a device"),
    "pipe": ([(CONTENTS, contents(GOOD)), (special("a", tarfile.FIFOTYPE), b"")], "is a device"),
    "folder": ([(CONTENTS, contents(GOOD)), (special("a", tarfile.DIRTYPE), b"")], "is a folder"),
    "twice": ([(CONTENTS, contents(GOOD)), ("a", b"1"), ("a", b"1")], "'a', which it does not list"),
    "listed twice": (
        [(CONTENTS, contents({"a": b"1", "A": b"1"})), ("a", b"1"), ("A", b"1")],
        "lists a twice",
    ),
    "a file and a folder": (
        [(CONTENTS, contents({"a": b"1", "a/b": b"1"})), ("a", b"1"), ("a/b", b"1")],
        "exists",
    ),
    "another content": ([(CONTENTS, contents(GOOD)), ("a", b"2")], "does not have the hash"),
    "another size": ([(CONTENTS, contents(GOOD)), ("a", b"12")], "has 'a' of 2 bytes"),
    "missing": ([(CONTENTS, contents(GOOD))], "ends before a"),
    "no list": ([("a", b"1")], "does not begin with contents.json"),
    "empty": ([], "does not begin with contents.json"),
    "version": ([(CONTENTS, contents(GOOD, format_version=2)), ("a", b"1")], "format version 2"),
    "unknown key": ([(CONTENTS, contents(GOOD, more=1)), ("a", b"1")], "wrong contents.json"),
    "no JSON": ([(CONTENTS, b"{"), ("a", b"1")], "not JSON"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_writes_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members, told = HOSTILE[kind]
    (tmp_path / "in").mkdir()
    archive = archive_of(tmp_path / "in", members)
    before = everything(tmp_path)
    assert main(["unpack", str(archive), "--out", str(tmp_path / "in" / "out")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert everything(tmp_path) == before


@pytest.mark.parametrize("at", [0, 300, 600, 1500, -70000, -20000])
def test_a_damaged_byte_is_told(at: int, folder: Path, tmp_path: Path, refused: Callable[..., Any]) -> None:
    pack(folder, tmp_path / "a.tar", "ort")
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[at] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    before = everything(tmp_path)
    try:
        unpack(tmp_path / "a.tar", tmp_path / "out")
    except Exception:
        with refused("unpack", "a.tar"):
            unpack(tmp_path / "a.tar", tmp_path / "out")
        assert everything(tmp_path) == before
    else:  # padding, which is of no file
        for name, right in FILES.items():
            assert (tmp_path / "out" / name).read_bytes() == right


@pytest.mark.parametrize("kept", [0, 100, 512, 1024, 5000, 60000])
def test_a_cut_archive_is_told(kept: int, folder: Path, tmp_path: Path, refused: Callable[..., Any]) -> None:
    pack(folder, tmp_path / "a.tar", "ort")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:kept])
    before = everything(tmp_path)
    with refused("unpack", "a.tar"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert everything(tmp_path) == before


def test_what_is_there_stays(folder: Path, tmp_path: Path, refused: Callable[..., Any]) -> None:
    pack(folder, tmp_path / "a.tar", "ort")
    before = everything(tmp_path)
    with refused("unpack", "not an empty folder"):
        unpack(tmp_path / "a.tar", folder)
    with refused("unpack", "does not exist"):
        unpack(tmp_path / "none.tar", tmp_path / "out")
    with refused("unpack", "is a folder"):
        unpack(folder, tmp_path / "out")
    assert everything(tmp_path) == before


def test_a_link_is_not_packed(folder: Path, tmp_path: Path, refused: Callable[..., Any]) -> None:
    (folder / "link").symlink_to("/etc/hosts")
    with refused("pack", "link is not a file"):
        pack(folder, tmp_path / "a.tar", "ort")
