"""However an export ends, the previous bundle is whole and the next export cleans up."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stillgraph.exporter import staging
from stillgraph.exporter.bundle import build
from stillgraph.exporter.config import ExportConfig
from stillgraph.exporter.staging import staged, staged_file
from stillgraph.files import check_files
from stillgraph.manifest import MANIFEST, read
from stillgraph.spec import GraphShape

Refused = Callable[..., AbstractContextManager[None]]
DECODE = GraphShape(role="decode", max_len=1, ctx=40)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What staging takes for a bundle: a folder with a manifest. Alone in its parent."""
    folder = tmp_path / "beside" / "place"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("former")
    (folder / "old").write_text("old")
    return folder


@pytest.fixture
def own(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A real bundle that a test may lose, alone in its parent."""
    return shutil.copytree(tiny_bundle(), tmp_path / "beside" / "own")


def write_new(place: Path) -> None:
    with staged(place) as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent == place.resolve().parent
        (folder / MANIFEST).write_text("new")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_bundle_takes_the_place_of_the_former(
    place: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # a file system, or a system, without the atomic exchange
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    write_new(place)
    assert contents(place.parent) == {f"place/{MANIFEST}": b"new"}


@pytest.mark.parametrize("name", ["deep/er/new", "empty"])
def test_a_new_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    write_new(tmp_path / name)
    assert contents(tmp_path / name) == {MANIFEST: b"new"}
    assert [path.name for path in (tmp_path / name).parent.iterdir() if "staging" in path.name] == []


def test_a_link_to_a_bundle_stays_a_link(place: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(place)
    write_new(link)
    assert link.is_symlink()
    assert contents(place.parent) == {f"place/{MANIFEST}": b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "link"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_former(place: Path, error: type[BaseException]) -> None:
    before = contents(place.parent)
    with pytest.raises(error), staged(place) as folder:  # noqa: PT012 - the block is what fails
        (folder / "half").write_text("half")
        raise error
    assert contents(place.parent) == before
    assert [path.name for path in place.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_a_bundle_is_not_touched(refused: Refused, tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other"
    if kind == "file":
        other.write_text("mine")
    else:
        other.mkdir()
        (other / "mine").write_text("mine")
    before = contents(tmp_path)
    with refused("write bundle", f"{other} exists and is not a bundle", "another --out"), staged(other):
        pytest.fail("got a folder to write to")
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused("write bundle", "file/new", "another --out"), staged(tmp_path / "file" / "new"):
        pytest.fail("got a folder to write to")


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("own_number", [False, True])
def test_leftovers_of_the_dead_are_removed(place: Path, dead: int, own_number: bool) -> None:
    """In a container, where numbers start again, a killed export may have had our own number."""
    pid = os.getpid() if own_number else dead
    for kind in ("staging", "former"):
        (place.parent / f".place.{kind}-{pid}").mkdir()
    write_new(place)
    assert contents(place.parent) == {f"place/{MANIFEST}": b"new"}
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_two_at_once_do_not_lose_one(place: Path, refused: Refused) -> None:
    with staged(place) as folder:
        (folder / MANIFEST).write_text("first")
        with refused("write bundle", "another process is writing", "wait for it"), staged(place):
            pytest.fail("the second began")
    assert contents(place) == {MANIFEST: b"first"}
    write_new(place)


@pytest.mark.parametrize("there", [True, False])
def test_what_changed_meanwhile_is_not_replaced(place: Path, refused: Refused, there: bool) -> None:
    """As by a validation, or where there are no locks by a second export."""
    if not there:
        shutil.rmtree(place)
    with (
        refused("write bundle", "was changed by another process meanwhile", "run the command again"),
        staged(place),
    ):
        place.mkdir(exist_ok=True)
        (place / MANIFEST).write_text("other")
    assert contents(place)[MANIFEST] == b"other"


def test_all_is_on_the_disk_before_it_moves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, sync, move = list[str](), os.fsync, staging._move
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    monkeypatch.setattr(staging, "_move", lambda *paths: (done.append("moved"), move(*paths)))
    with staged(place) as folder:
        (folder / "reports").mkdir()
        written = {folder / MANIFEST, folder / "reports" / "parity.json", folder / "reports"}
        for path in written:
            if not path.is_dir():
                path.write_text("new")
    moved = done.index("moved")
    assert set(done[:moved]) == {str(path) for path in written}
    assert done[moved + 1 :] == [str(place.parent)]


def test_leftovers_of_others_are_not(place: Path) -> None:
    """A running process, another bundle, a name that only looks alike."""
    keep = {f".place.staging-{os.getppid()}", ".places.staging-1", ".place.staging-mine"}
    for name in keep:
        (place.parent / name).mkdir()
    write_new(place)
    assert {path.name for path in place.parent.iterdir()} == {"place", *keep}


def test_a_kill_between_the_two_renames_is_fixed(place: Path, dead: int) -> None:
    place.rename(place.parent / f".place.former-{dead}")
    with pytest.raises(ZeroDivisionError), staged(place):  # noqa: PT012 - the block is what fails
        assert (place / "old").read_text() == "old"
        raise ZeroDivisionError


def test_names_are_taken_word_for_word(tmp_path: Path, dead: int) -> None:
    """A `[` is part of a name, not of a pattern."""
    (tmp_path / f".a[b].staging-{dead}").mkdir()
    write_new(tmp_path / "a[b]")
    assert [path.name for path in tmp_path.iterdir()] == ["a[b]"]


def test_a_file_is_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    staged_file(path, "first")

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        staged_file(path, "second")
    assert path.read_text() == "first"


def test_files_left_by_the_dead_are_removed(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".report.json.staging-{dead}").write_text("half")
    (tmp_path / f".other.json.staging-{dead}").write_text("half")
    staged_file(tmp_path / "report.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", f".other.json.staging-{dead}"}


def export(model: Path, out: Path) -> None:
    build.export(ExportConfig(model=str(model), out=out), [DECODE], replace=True, say=lambda line: None)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_space_for_the_weights(
    refused: Refused, own: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there when the export was estimated, and is not when the weights are written."""
    before, free = contents(own.parent), [10**9, 1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, free.pop(0)))
    with refused("write weights", "0.00 GB of free disk space", "free space or give another --out"):
        export(tiny_checkpoint(), own)
    assert contents(own.parent) == before


def test_the_disk_fills_up_while_weights_are_written(
    refused: Refused, own: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: Any, **__: Any) -> None:
        (folder / "weights.data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(own.parent)
    monkeypatch.setattr(build.weights, "write", full)
    with refused("write bundle", f"{own}: No space left on device", "free space"):
        export(tiny_checkpoint(), own)
    assert contents(own.parent) == before


CHILD = """
import pathlib, signal, sys, time
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.config import ExportConfig
from stillgraph.spec import GraphShape

def say(line):
    print(line, flush=True)
    if line.startswith(sys.argv[3]):
        time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with Ctrl-C ignored
config = ExportConfig(model=sys.argv[1], out=pathlib.Path(sys.argv[2]))
export(config, [GraphShape(role="prefill", max_len=8, ctx=40)], False, say)
"""


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGKILL, "checking prefill-8"), (signal.SIGINT, "writing weights")]
)
def test_a_signal_in_the_middle(
    own: Path, tiny_checkpoint: Callable[..., Path], number: signal.Signals, moment: str
) -> None:
    """kill -9 with every file written but the manifest, and Ctrl-C before the weights."""
    before = contents(own)
    command = [sys.executable, "-c", CHILD, str(tiny_checkpoint()), str(own), moment]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert any(line.startswith(moment) for line in child.stdout), "the child ended before"
    staging_folder = own.parent / f".own.staging-{child.pid}"
    assert (staging_folder / "prefill-8.onnx").exists() is (number == signal.SIGKILL)
    child.send_signal(number)
    assert child.wait(30) == -number
    child.stdout.close()
    assert contents(own) == before
    check_files(own, read(own), hashes=True)
    assert staging_folder.exists() is (number == signal.SIGKILL)
    with staged(own) as folder:
        shutil.copytree(own, folder, dirs_exist_ok=True)
    assert [path.name for path in own.parent.iterdir()] == ["own"]
    assert contents(own) == before
