"""A bundle's files: described when they are written, checked when they are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.external_data import unlisted_files
from stillgraph.manifest import File, Manifest
from stillgraph.page_cache import read_in


def check_files(bundle: Path, manifest: Manifest, hashes: bool = False, sums: bool = False) -> None:
    """Check that every file is there with its size, and that graphs read no others. Raises StillgraphError.

    sums: and its page sums, which reads it into the page cache; hashes: and its hash.
    """
    remedy, listed = "copy or export the bundle again", {file.path for file in manifest.all_files()}
    for file in manifest.all_files():
        if problem := damage(bundle, file, hashes, sums):
            raise StillgraphError("load bundle", problem, remedy)
    for graph in manifest.graphs.values():
        path = bundle / graph.file.path
        try:
            others = sorted(unlisted_files(path, listed))
        except (OSError, ValueError) as error:
            raise StillgraphError("load bundle", f"{path} is not an ONNX graph ({error})", remedy) from error
        if others:
            problem = f"{path} reads {others[0]!r:.200}, which is no file of the bundle's manifest"
            raise StillgraphError("load bundle", problem, remedy)


def damage(bundle: Path, file: File, hashes: bool = False, sums: bool = False) -> str | None:
    """What is wrong with a file, or None. hashes, sums: as for `check_files`."""
    path = bundle / file.path
    try:
        if not path.is_file():
            return f"{path} is missing"
        if not any(path.resolve().is_relative_to(folder) for folder in _own(bundle.resolve())):
            return f"{path} leaves the bundle"
        if (size := path.stat().st_size) != file.nbytes:
            return f"{path} has {size} bytes where {file.nbytes} are expected"
        if sums and file.page_sums is not None and read_in(path) != file.page_sums:
            return f"{path} is damaged: it does not have the page sums that it was written with"
        if hashes and sha256(path) != file.sha256:
            return f"{path} is damaged: it does not have the hash that it was written with"
    except OSError as error:
        return f"{path!s:.300} cannot be read ({error.strerror or error})"
    return None


def _own(bundle: Path) -> list[Path]:
    """Folders that a bundle's links may lead to: its own, and where the hub's cache, which has a bundle as
    REPOSITORY/snapshots/REVISION, keeps all files."""
    return [bundle, *([bundle.parent.parent / "blobs"] if bundle.parent.name == "snapshots" else [])]


def describe(bundle: Path, path: Path) -> File:
    """The entry of a file in a bundle's folder."""
    name, nbytes = path.relative_to(bundle).as_posix(), path.stat().st_size
    return File(path=name, nbytes=nbytes, sha256=sha256(path), page_sums=read_in(path))


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
