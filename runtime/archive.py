"""An archive of a shipped folder: a plain tar whose first member lists all others with size and SHA-256.

The same folder gives the same bytes: members are sorted and have no times, owners or modes of their own, and
nothing is compressed. Only what such an archive can hold is unpacked: files, each once, under the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from pydantic import ValidationError

from stillgraph.errors import StillgraphError, first_line
from stillgraph.files import sha256
from stillgraph.manifest import File
from stillgraph.spec import Frozen

CONTENTS = "contents.json"
MOST_CONTENTS = 16_000_000  # bytes of the list
PIECE = 1 << 20
STAGE = "unpack"


class Contents(Frozen):
    """The list of an archive. runtime: what the folder was shipped for; files: in the archive's order."""

    format_version: Literal[1] = 1
    runtime: str
    files: tuple[File, ...]


def pack(folder: Path, archive: Path, runtime: str) -> None:
    """Write the files of a folder as an archive, in one step. Raises StillgraphError for a link."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise StillgraphError("pack", f"{path} is not a file", "ship the bundle again")
    names = [path.relative_to(folder).as_posix() for path in paths]
    files = tuple(
        File(path=name, nbytes=path.stat().st_size, sha256=sha256(path))
        for name, path in zip(names, paths, strict=True)
    )
    listed = (
        Contents(runtime=runtime, files=files).model_dump_json(indent=1, exclude_none=True).encode() + b"\n"
    )
    beside = archive.with_name(f".{archive.name}.part-{os.getpid()}")
    try:
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(_member(CONTENTS, len(listed)), io.BytesIO(listed))
            for file, path in zip(files, paths, strict=True):
                with path.open("rb") as stream:
                    tar.addfile(_member(file.path, file.nbytes), stream)
        beside.replace(archive)
    except OSError as error:
        raise StillgraphError(
            "pack", f"{archive}: {error.strerror}", "free space, or give another --out"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _member(name: str, nbytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = nbytes, 0o644
    return member


def unpack(archive: Path, out: Path) -> Contents:
    """Unpack into `out`, a folder that is not there yet or is empty, once every file is as it is listed.

    Raises StillgraphError for an archive that is damaged, or has anything but the files of its list; then
    nothing is left of it, and nothing was written outside a folder beside `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StillgraphError(STAGE, f"{out} exists and is not an empty folder", "give another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise StillgraphError(STAGE, f"{out}: {error.strerror}", "give another --out") from error
    try:
        contents = _extract(archive, staging)
        staging.chmod(0o755)  # a temporary folder is its owner's alone
        if out.is_dir():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise StillgraphError(
            STAGE, f"{out}: {error.strerror or error}", "free space or give another --out"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return contents


def _extract(archive: Path, folder: Path) -> Contents:
    try:
        with archive.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = _members(archive, tar)
            contents = _contents(archive, tar, next(members, None))
            for file in contents.files:
                member = next(members, None)
                if member is None:
                    _refuse(archive, f"ends before {file.path}, which it lists")
                if member.name != file.path or member.size != file.nbytes:
                    expected = f"{file.path} of {file.nbytes} bytes"
                    _refuse(archive, f"has {member.name!r} of {member.size} bytes where it lists {expected}")
                _write(archive, tar.extractfile(member), folder / file.path, file)
            if (more := next(members, None)) is not None:
                _refuse(archive, f"has {more.name!r}, which it does not list")
    except FileNotFoundError:
        raise StillgraphError(
            STAGE, f"{archive} does not exist", "name an archive of 'stillgraph ship'"
        ) from None
    except IsADirectoryError:
        raise StillgraphError(
            STAGE, f"{archive} is a folder", "name an archive of 'stillgraph ship'"
        ) from None
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        _refuse(archive, f"is damaged or no archive of 'stillgraph ship' ({first_line(error)})")
    return contents


def _members(archive: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Each member. Raises StillgraphError for one that is no plain file."""
    while (member := tar.next()) is not None:
        if not member.isreg() or member.issparse():
            _refuse(archive, f"has {member.name!r}, which is {_kind(member)} and not a file")
        yield member


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r}"
    return "a folder" if member.isdir() else "a device" if member.isdev() else "of a kind of its own"


def _contents(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Contents:
    if member is None or member.name != CONTENTS or member.size > MOST_CONTENTS:
        _refuse(archive, f"does not begin with {CONTENTS}")
    stream = tar.extractfile(member)
    assert stream is not None
    try:
        raw: Any = json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        _refuse(archive, f"has a {CONTENTS} that is not JSON ({first_line(error)})")
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != 1:
        problem = f"{archive} has format version {version!r} and this stillgraph understands 1"
        raise StillgraphError(STAGE, problem, "upgrade with 'pip install --upgrade stillgraph'")
    try:
        contents = Contents.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        _refuse(archive, f"has a wrong {CONTENTS}: {first['msg']}")
    names = [file.path.casefold() for file in contents.files]  # as some file systems compare them
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        _refuse(archive, f"lists {twice} twice")
    if colon := next((name for name in names if ":" in name), None):
        _refuse(archive, f"lists {colon!r}, which may leave the folder")
    return contents


def _write(archive: Path, stream: Any, path: Path, file: File) -> None:
    """Copy a member, and compare its hash."""
    source: BinaryIO = stream
    total = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as target:
        while piece := source.read(PIECE):
            total.update(piece)
            target.write(piece)
    if total.hexdigest() != file.sha256:
        _refuse(archive, f"is damaged: {file.path} does not have the hash that it lists")


def _refuse(archive: Path, problem: str) -> NoReturn:
    raise StillgraphError(STAGE, f"{archive} {problem}", "get the archive again from whom you trust")
