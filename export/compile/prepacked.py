"""One file of weights for the graphs that ONNX Runtime optimized: every blob once.

ONNX Runtime writes, for each graph, a file of its weights as they are and as its kernels pack them. A packed
blob is an entry `prepacked_<n>` of the weight's external data, `<kernel>+<hash>|<offset>;<length>;<checksum>`
with a further `|...` for each further buffer, and lies in the same file as the weight itself: that is read at
load, to be packed again and compared, and not afterward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from onnx import GraphProto, ModelProto, TensorProto

ALIGNMENT = 4096  # a page: what two sessions map of a blob is then nothing but that blob
CHUNK = 1 << 23
PREPACKED = "prepacked_"

Place = tuple[str, int, int]  # file, relative to the bundle; offset; bytes
Span = tuple[int, int]


class PackedFile:
    """The file being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}
        self._file = path.open("wb")

    def close(self) -> int:
        """The bytes written; no more can follow."""
        nbytes = self._file.tell()
        self._file.close()
        return nbytes

    def put(self, source: BinaryIO, offset: int, nbytes: int) -> int:
        """Where the blob at source[offset : offset + nbytes] lies in this file; written if it is new."""
        digest = hashlib.sha256()
        for chunk in chunks(source, offset, nbytes):
            digest.update(chunk)
        place = self._places.get(digest.digest())
        if place is None:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            place = self._places[digest.digest()] = self._file.tell()
            for chunk in chunks(source, offset, nbytes):
                self._file.write(chunk)
        return place


def take_in(
    model: ModelProto, work: Path, packed: PackedFile, bundle: Path, stored: dict[str, Place]
) -> None:
    """Move what an optimized graph has in files of the folder `work` into `packed`.

    stored: where the bundle has each weight by name. A weight that is there, and is not packed, stays there;
    the location of all others becomes "", for `locate` to set. The graph's external data is rewritten.
    """
    outside = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    files = {name: (work / name).open("rb") for name in {external(tensor)["location"] for tensor in outside}}
    try:
        for tensor in outside:
            entries = external(tensor)
            source, span = files[entries["location"]], (int(entries["offset"]), int(entries["length"]))
            blobs = {name: moved(value, source, packed) for name, value in packed_entries(tensor)}
            known = stored.get(tensor.name)
            if not blobs and known and same_bytes(source, span, bundle, known):
                _set(tensor, location=known[0], offset=str(known[1]))
            else:
                _set(tensor, location="", offset=str(packed.put(source, *span)), **blobs)
    finally:
        for file in files.values():
            file.close()


def locate(model: ModelProto, place: Callable[[str], str]) -> None:
    """Pass every location of external data through `place`."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            _set(tensor, location=place(external(tensor)["location"]))


def pack_largest_first(graph: GraphProto) -> None:
    """Move the node of the largest packed weight to the front.

    ONNX Runtime packs in the order of the nodes in the file, runs them by their edges, and at load holds a
    weight of the current node three times: as it is, packed again, and the packed one that it maps. While
    nothing else is mapped yet the head, which would come last, costs no more memory than a run will.
    """
    sizes = {
        tensor.name: max((int(value.split(";")[1]) for _, value in packed_entries(tensor)), default=0)
        for tensor in graph.initializer
    }
    nodes = list(graph.node)
    largest = max(nodes, key=lambda node: max((sizes.get(name, 0) for name in node.input), default=0))
    del graph.node[:]
    graph.node.extend([largest, *(node for node in nodes if node is not largest)])


def packed_entries(tensor: TensorProto) -> list[tuple[str, str]]:
    """The entries of external data that say where packed blobs lie."""
    return [(name, value) for name, value in external(tensor).items() if name.startswith(PREPACKED)]


def external(tensor: TensorProto) -> dict[str, str]:
    """The entries of a tensor's external data; offset is 0 where the file leaves it out."""
    return {"offset": "0"} | {entry.key: entry.value for entry in tensor.external_data}


def same_bytes(source: BinaryIO, span: Span, bundle: Path, place: Place) -> bool:
    """Whether span (offset, bytes) of `source` holds what the bundle has at `place`."""
    path, offset, nbytes = place
    if span[1] != nbytes:
        return False
    with (bundle / path).open("rb") as other:
        pairs = zip(chunks(source, *span), chunks(other, offset, nbytes), strict=True)
        return all(first == second for first, second in pairs)


def chunks(file: BinaryIO, offset: int, nbytes: int) -> Iterator[bytes]:
    """The bytes in pieces. Raises EOFError where the file ends too early."""
    file.seek(offset)
    while nbytes:
        chunk = file.read(min(nbytes, CHUNK))
        if not chunk:
            raise EOFError(f"{file.name} ends before its last weight")
        nbytes -= len(chunk)
        yield chunk


def moved(entry: str, source: BinaryIO, packed: PackedFile) -> str:
    """Put the packed blobs of an entry into the file; the entry with their new offsets."""
    key, *buffers = entry.split("|")
    result = []
    for buffer in buffers:
        offset, nbytes, *rest = buffer.split(";")
        result.append(";".join([str(packed.put(source, int(offset), int(nbytes))), nbytes, *rest]))
    return "|".join([key, *result])


def _set(tensor: TensorProto, **values: str) -> None:
    entries = external(tensor) | values
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
