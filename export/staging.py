"""A folder that is written beside its place and moved into it when complete."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.manifest import MANIFEST

AT_FDCWD = -100
RENAME_EXCHANGE = 2


@contextmanager
def staged(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place`; on leaving without an error it becomes `place`.

    However the process ends before that, `place` keeps its old content, and power may fail from then on: all
    is on the disk before it moves. Folders left behind by processes that are gone are removed. Raises
    StillgraphError where `place` is something else than a bundle, where another process is writing it, and
    where it has changed meanwhile.
    """
    check_place(place)
    problem = f"another process is writing {place}"
    with alone(place, StillgraphError("write bundle", problem, "wait for it, or give another --out")):
        yield from _staged(place)


def _staged(place: Path) -> Iterator[Path]:
    former = _manifest(place)
    real = place.resolve()  # a link to a bundle stays a link
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(real)
        staging = real.parent / f".{real.name}.staging-{os.getpid()}"
        staging.mkdir()
    except OSError as error:
        raise StillgraphError("write bundle", f"{place}: {error.strerror}", "give another --out") from error
    try:
        yield staging
        if _manifest(place) != former:
            problem = f"{place} was changed by another process meanwhile"
            raise StillgraphError("write bundle", problem, "run the command again")
        for path in staging.rglob("*"):
            _sync(path)
        _move(staging, real)
        _sync(real.parent)
    except OSError as error:
        problem = f"{place}: {error.strerror or error}"
        raise StillgraphError("write bundle", problem, "free space or give another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_place(place: Path) -> None:
    """Raises StillgraphError where `place` is something else than a bundle."""
    if place.exists() and (not place.is_dir() or (any(place.iterdir()) and not (place / MANIFEST).is_file())):
        raise StillgraphError("write bundle", f"{place} exists and is not a bundle", "give another --out")


def staged_file(path: Path, content: str) -> None:
    """Write a text file in one step: a reader, or a crash, sees the previous content or the new."""
    _remove_leftovers(path)
    staging = path.with_name(f".{path.name}.staging-{os.getpid()}")
    try:
        staging.write_text(content, encoding="utf-8")
        _sync(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def alone(folder: Path, busy: StillgraphError) -> Iterator[None]:
    """While no other process has this folder so, where it exists and the system has such locks.

    Raises `busy` where one has it.
    """
    if sys.platform == "win32" or not folder.is_dir():
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        os.close(handle)
        raise busy from None
    try:
        yield
    finally:
        os.close(handle)


def _manifest(place: Path) -> bytes | None:
    try:
        return (place / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk; nothing where a folder cannot be asked."""
    if path.is_symlink() or (path.is_dir() and sys.platform == "win32"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(staging: Path, place: Path) -> None:
    if not place.exists():
        staging.rename(place)
    elif not _exchange(staging, place):
        # No atomic exchange here: the previous bundle is moved away for the length of one rename.
        aside = place.parent / f".{place.name}.former-{os.getpid()}"
        place.rename(aside)
        staging.rename(place)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one system call, where Linux and the file system can."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def _remove_leftovers(place: Path) -> None:
    for kind in ("former", "staging"):
        for folder in list(place.parent.iterdir()):
            prefix, _, pid = folder.name.rpartition("-")
            if prefix != f".{place.name}.{kind}" or not pid.isdecimal() or _at_work(int(pid)):
                continue
            if kind == "former" and not place.exists():
                folder.rename(place)  # a kill between the two renames of `_move`
            elif folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.unlink(missing_ok=True)


def _at_work(pid: int) -> bool:
    """Whether another process of this id runs. In a container every export may have the same id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
