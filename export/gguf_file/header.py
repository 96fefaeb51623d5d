"""The bytes of a GGUF file: its metadata, and where its tensors lie. No count in it is trusted.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; torch is not needed.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from stillgraph.errors import StillgraphError

STAGE = "read GGUF"
VERSIONS = (2, 3)
DOWNLOAD = "download the file again"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
T = TypeVar("T")
MOST_DIMENSIONS = 4
MOST_NAMES = 1_000_000  # keys or tensors: an empty one takes bytes too, but a file may have many


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. shape: rows first, as in torch; kind: how its rows are stored, "Q4_1"; start: in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its weights."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, *kinds: type) -> Any:
        """A value of the metadata, or None. Raises StillgraphError for one of another kind."""
        value = self.metadata.get(key)
        if value is not None and type(value) not in kinds:
            self.refuse(f"{key} is {value!r:.40}, not of the kind that it should be", DOWNLOAD)
        return value

    def refuse(self, problem: str, remedy: str) -> NoReturn:
        raise StillgraphError(STAGE, f"{self.path}: {problem}", remedy)


def read_header(path: Path) -> Header:
    """Raises StillgraphError for a file that is no GGUF, of another version, or cut short."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except ValueError as error:  # of mmap: an empty file
        raise StillgraphError(STAGE, f"{path} is empty", DOWNLOAD) from error
    except OSError as error:
        raise StillgraphError(STAGE, f"{path}: {error.strerror}", "name a GGUF file") from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def header(self) -> Header:
        magic = self.data[:4]
        if magic != b"GGUF":
            self.refuse(f"is not a GGUF: it begins with {magic!r}", "name a GGUF file")
        self.at = 4
        version = self.scalar(4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "a big-endian GGUF" if swapped else f"a GGUF of version {version}"
            self.refuse(f"is {what}, and read are little-endian ones of 2 and 3", "convert the model again")
        tensors, keys = self.scalar(10), self.scalar(10)
        metadata = self.named(keys, "metadata key", lambda name: self.value(self.scalar(4)))
        infos = self.named(tensors, "tensor", self.tensor)
        return Header(self.path, metadata, self.placed(infos, metadata.get("general.alignment", 32)))

    def named(self, count: int, what: str, read: Callable[[str], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        if count > MOST_NAMES:
            self.refuse(f"is damaged: it says to hold {count} of {what}", DOWNLOAD)
        for _ in range(count):
            name = self.string()
            if name in found:
                self.refuse(f"has {what} {name!r:.80} twice", DOWNLOAD)
            found[name] = read(name)
        return found

    def tensor(self, name: str) -> TensorInfo:
        dimensions = self.scalar(4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self.refuse(f"has tensor {name!r:.80} of {dimensions} dimensions", DOWNLOAD)
        shape = tuple(reversed([self.scalar(10) for _ in range(dimensions)]))
        number, start = self.scalar(4), self.scalar(10)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            remedy = "update the package gguf, or name a GGUF of another quantization"
            self.refuse(f"has tensor {name!r:.80} of the unknown type {number}", remedy)
        block, nbytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            self.refuse(f"has tensor {name!r:.80} of {kind.name} in rows of {shape[-1]}", DOWNLOAD)
        return TensorInfo(name, shape, kind.name, start, math.prod(shape) // block * nbytes)

    def placed(self, infos: dict[str, TensorInfo], alignment: object) -> dict[str, TensorInfo]:
        """The tensors with their place in the file, each of which is seen to be in it."""
        if type(alignment) is not int or alignment < 1:
            self.refuse(f"has an alignment of {alignment!r:.40}", DOWNLOAD)
        begin = -(-self.at // alignment) * alignment
        for info in infos.values():
            if (end := begin + info.start + info.nbytes) > len(self.data):
                problem = f"is cut short: {info.name!r:.80} ends at byte {end} of {len(self.data)}"
                self.refuse(problem, DOWNLOAD)
        return {
            name: TensorInfo(name, info.shape, info.kind, begin + info.start, info.nbytes)
            for name, info in infos.items()
        }

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(kind)
        kind, count = self.scalar(4), self.scalar(10)
        if kind == STRING:
            self.room(8 * count)
            return [self.string() for _ in range(count)]
        self.known(kind)
        found = self.unpack(f"{count}{SCALARS[kind]}", count * struct.calcsize(f"<{SCALARS[kind]}"))
        return list(found)

    def scalar(self, kind: int) -> Any:
        self.known(kind)
        return self.unpack(SCALARS[kind], struct.calcsize(f"<{SCALARS[kind]}"))[0]

    def known(self, kind: int) -> None:
        if kind not in SCALARS:
            self.refuse(f"is damaged: a value of type {kind} at byte {self.at}", DOWNLOAD)

    def string(self) -> str:
        length = self.scalar(10)
        self.room(length)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            self.refuse(f"is damaged: no UTF-8 before byte {self.at}", DOWNLOAD)

    def unpack(self, form: str, nbytes: int) -> tuple[Any, ...]:
        self.room(nbytes)
        self.at += nbytes
        return struct.unpack_from(f"<{form}", self.data, self.at - nbytes)

    def room(self, nbytes: int) -> None:
        if self.at + nbytes > len(self.data):
            problem = f"is cut short: {nbytes} bytes are to follow byte {self.at} of {len(self.data)}"
            self.refuse(problem, DOWNLOAD)

    def refuse(self, problem: str, remedy: str) -> NoReturn:
        raise StillgraphError(STAGE, f"{self.path} {problem}", remedy)
