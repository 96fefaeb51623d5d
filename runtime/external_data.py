"""Which files the tensors of an ONNX graph lie in, by its bytes: onnx is no part of the runtime.

Messages and their fields are those of onnx.proto; a field of another number or type is skipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
DEEPEST = 100  # as protobuf's own readers have it


def unlisted_files(graph: Path, listed: Collection[str]) -> set[str]:
    """Paths in a graph, relative to its folder, that are not listed. Raises ValueError for no graph."""
    content = graph.read_bytes()
    # A tensor's place has this word in it. Where each stands as exporters write it, before a listed path and
    # nothing else, there is no need to walk through the graph, which takes a millisecond a layer.
    if content.count(b"location") == sum(content.count(_entry(name.encode())) for name in listed):
        return set()
    return set(_locations(memoryview(content), "model", 0)) - set(listed)


def _entry(path: bytes) -> bytes:
    """The field of a tensor that says in which file it is, where its length is below 128."""
    value = b"\x0a\x08location\x12" + bytes([min(len(path), 127)]) + path
    return b"\x6a" + bytes([min(len(value), 127)]) + value


def _locations(message: memoryview, kind: str, depth: int) -> Iterator[str]:
    if depth > DEEPEST:
        raise ValueError("messages are nested too deeply")
    for number, value in _fields(message):
        inside = INSIDE[kind].get(number)
        if inside == "entry":
            entry = {key: bytes(part) for key, part in _fields(value)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif inside:
            yield from _locations(value, inside, depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The number and the bytes of each field that has a length: messages, text and packed numbers."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 2:
            size, at = _varint(message, at)
            if size > end - at:
                raise ValueError("a field is longer than what is left")
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"a field has wire type {wire}")
    if at > end:
        raise ValueError("the last field is cut short")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")
