"""An ONNX decoder that another exporter made: its ports found by name and shape, its precision by its ops.

Shapes: S new tokens, T tokens before them, KV key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from stillgraph.certificate import STAGE
from stillgraph.errors import StillgraphError, first_line
from stillgraph.manifest import Precision
from stillgraph.spec import ModelSpec

DTYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT64: np.int64,
    TensorProto.INT32: np.int32,
    TensorProto.BOOL: np.bool_,
}
# What an input is fed, of ids [1, S] after T tokens; its rank is that of the array.
FEEDS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "input_ids": lambda ids, past: ids,
    "attention_mask": lambda ids, past: np.ones((1, past + ids.shape[1]), np.int64),
    "position_ids": lambda ids, past: past + np.arange(ids.shape[1])[None],
    "cache_position": lambda ids, past: past + np.arange(ids.shape[1]),
    "use_cache_branch": lambda ids, past: np.array([past > 0]),
    "num_logits_to_keep": lambda ids, past: np.array(1),
    "logits_to_keep": lambda ids, past: np.array(1),
}
LENGTHS = {
    "input_ids": 1,
    "attention_mask": 1,
    "position_ids": 1,
    "cache_position": 0,
}  # their axis of tokens
SHARING = "GroupQueryAttention"  # writes into its past, where that has room
FEW_BITS = {"MatMulNBits": 4, "GatherBlockQuantized": 4, "MatMulBnb4": 4, "MatMulInteger": 8,
            "QLinearMatMul": 8, "DynamicQuantizeMatMul": 8, "MatMulIntegerToFloat": 8}  # fmt: skip
DEQUANTIZED = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}


@dataclass(frozen=True)
class ForeignPort:
    """One input or output. shape: a number, or None for a length that every call may choose."""

    name: str
    dtype: type
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class ForeignCache:
    """A layer's keys, or values. length: the axis of tokens; alike: whether it is [1, KV, T, D], as
    transformers has it."""

    past: ForeignPort
    present: str
    length: int
    alike: bool
    sizes: tuple[int, ...]  # with 0 tokens

    def of(self, tokens: int) -> tuple[int, ...]:
        return (*self.sizes[: self.length], tokens, *self.sizes[self.length + 1 :])


@dataclass(frozen=True)
class ForeignGraph:
    """inputs: those of FEEDS; caches: keys and values in turn, of each layer that has them; integers: whether
    products are of integers, so that inputs are rounded; shares: whether
    past and present may be one buffer of more room; data: files of weights beside it."""

    path: Path
    inputs: tuple[ForeignPort, ...]
    caches: tuple[ForeignCache, ...]
    precision: Precision
    integers: bool
    shares: bool
    data: tuple[str, ...]

    @property
    def alike(self) -> bool:
        """Whether keys and values are laid out as transformers' are."""
        return all(cache.alike for cache in self.caches)

    @property
    def rounds(self) -> bool:
        return self.precision in ("int8", "int4")


def find_graph(subject: Path) -> Path:
    """The graph of a file, or the one of a folder that takes keys and values. Raises StillgraphError."""
    if subject.is_file():
        return subject
    if not subject.is_dir():
        raise StillgraphError(STAGE, f"{subject}: no such file or folder", "name a bundle or an ONNX decoder")
    graphs = [path for folder in (subject, subject / "onnx") for path in sorted(folder.glob("*.onnx"))]
    found = [path for path in graphs if any(_cache_name(v.name) for v in _load(path).graph.input)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found or graphs) or "no ONNX file"
        many = "which all have keys and values" if found else "without inputs for keys and values"
        raise StillgraphError(
            STAGE, f"{subject} has {names}, {many}", "name a decoder that continues a cache"
        )
    return found[0]


def discover(path: Path, spec: ModelSpec) -> ForeignGraph:
    """How a graph is to be driven. Raises StillgraphError for what it takes and we do not know."""
    model = _load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    ports = [_port(path, value) for value in model.graph.input if value.name not in weights]
    outputs = {value.name for value in model.graph.output}
    for port in ports:
        if not _cache_name(port.name):
            _check_input(path, port)
    for needed, names in (("input_ids", {port.name for port in ports}), ("logits", outputs)):
        if needed not in names:
            raise _cannot(path, f"has no {needed}", "name a decoder from ids to logits")
    nodes = list(_nodes(model))
    return ForeignGraph(
        path=path,
        inputs=tuple(port for port in ports if not _cache_name(port.name)),
        caches=tuple(_caches(path, ports, outputs, spec)),
        precision=precision_of(model, nodes),
        integers=any(FEW_BITS.get(node.op_type) == 8 for node in nodes),
        shares=any(node.op_type == SHARING for node in nodes),
        data=tuple(sorted(_data_files(model))),
    )


def precision_of(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Precision:
    """The fewest bits that products read, of ops and of initializers."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    bits = []
    for node in nodes:
        if node.op_type in FEW_BITS:
            bits.append(next((a.i for a in node.attribute if a.name == "bits"), FEW_BITS[node.op_type]))
        elif node.op_type == "DequantizeLinear":
            bits.append(DEQUANTIZED.get(types.get(node.input[0], TensorProto.INT8), 8))
    if bits:
        return "int4" if min(bits) <= 4 else "int8"
    counts = {TensorProto.FLOAT: 0, TensorProto.FLOAT16: 0}
    for tensor in model.graph.initializer:
        if tensor.data_type in counts:
            counts[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
    return "fp16" if counts[TensorProto.FLOAT16] > counts[TensorProto.FLOAT] else "fp32"


def _load(path: Path) -> onnx.ModelProto:
    """Without the weights that are in other files."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has its own kinds
        problem = f"{path} is not ONNX ({first_line(error)})"
        raise StillgraphError(STAGE, problem, "name an ONNX file") from error


def _cannot(path: Path, problem: str, remedy: str) -> StillgraphError:
    return StillgraphError(STAGE, f"{path} cannot be driven: it {problem}", remedy)


def _port(path: Path, value: onnx.ValueInfoProto) -> ForeignPort:
    kind = value.type.tensor_type
    if kind.elem_type not in DTYPES:
        name = TensorProto.DataType.Name(kind.elem_type)
        raise _cannot(path, f"takes {value.name} of {name}", "export it with inputs of fp32 or fp16")
    sizes = tuple(dim.dim_value or None for dim in kind.shape.dim)
    return ForeignPort(value.name, DTYPES[kind.elem_type], sizes)


def _check_input(path: Path, port: ForeignPort) -> None:
    """Raises StillgraphError for an input that is not known, or not in this shape."""
    if port.name not in FEEDS:
        known = ", ".join(FEEDS)
        raise _cannot(path, f"takes {port.name}", f"export it with no inputs but keys, values and {known}")
    fed = FEEDS[port.name](np.zeros((1, 3), np.int64), 4)
    if len(port.shape) != fed.ndim:
        given = f"takes {port.name} of {len(port.shape)} dimensions where {fed.ndim} are known"
        raise _cannot(path, given, "export it with the usual shapes")
    axis = LENGTHS.get(port.name)
    batch = port.shape[0] if axis else None
    if axis is not None and (port.shape[axis] is not None or batch not in (None, 1)):
        given = f"takes {port.name} of static shape {[size or '?' for size in port.shape]}"
        raise _cannot(path, given, "export it with one row and free lengths")


def _cache_name(name: str) -> tuple[int, str] | None:
    """Layer, and key or value, of an input of keys or values; or None."""
    return _layer(name) if re.match(r"past|cache[._]", name) else None


def _layer(name: str) -> tuple[int, str] | None:
    rest = re.sub("key_?values?", "", name)
    numbers, kinds = re.findall(r"\d+", rest), re.findall("key|value", rest)
    return (int(numbers[0]), kinds[0]) if len(numbers) == len(kinds) == 1 else None


def _caches(
    path: Path, ports: list[ForeignPort], outputs: set[str], spec: ModelSpec
) -> Iterator[ForeignCache]:
    """Of each layer that has keys and values, in order. Raises StillgraphError."""
    pasts = {found: port for port in ports if (found := _cache_name(port.name))}
    presents = {found: name for name in outputs if name != "logits" and (found := _layer(name))}
    layers = sorted({layer for layer, _ in pasts})
    if not pasts:
        raise _cannot(path, "takes no keys and values", "export it with past_key_values")
    if len(layers) != len(spec.cached) or len(pasts) != 2 * len(layers):
        count = f"takes keys and values of {len(pasts)} names where the checkpoint has {2 * len(spec.cached)}"
        raise _cannot(path, count, "name the checkpoint that it was made from")
    if missing := sorted(set(pasts) - set(presents)):
        layer, kind = missing[0]
        raise _cannot(
            path, f"does not return the {kind} of layer {layer}", "export it with present keys and values"
        )
    for layer, own in zip(layers, spec.cached, strict=True):
        for kind in ("key", "value"):
            port = pasts[layer, kind]
            sizes = spec.layers[own].kv_heads, spec.layers[own].head_dim
            yield _cache(path, port, presents[layer, kind], sizes)


def _cache(path: Path, past: ForeignPort, present: str, sizes: tuple[int, int]) -> ForeignCache:
    """sizes: KV and D of the checkpoint, which stand for sizes that the port leaves open."""
    heads, size = sizes
    free = [axis for axis, length in enumerate(past.shape) if length is None and axis]
    standard = len(past.shape) == 4 and past.shape[1] in (None, heads) and past.shape[3] in (None, size)
    if standard and past.shape[2] is None:
        return ForeignCache(past, present, 2, past.shape[0] in (None, 1), (1, heads, 0, size))
    if len(free) != 1:
        raise _cannot(
            path,
            f"takes {past.name} of shape {[length or '?' for length in past.shape]}, in which no one axis is"
            " the number of tokens",
            "export it with a growing cache",
        )
    whole = tuple(0 if axis == free[0] else length or 1 for axis, length in enumerate(past.shape))
    return ForeignCache(past, present, free[0], False, whole)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Of the graph, of what is inside its ops, and of its functions."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting += graph.node


def _data_files(model: onnx.ModelProto) -> set[str]:
    entries = [e for tensor in model.graph.initializer for e in tensor.external_data]
    return {entry.value for entry in entries if entry.key == "location"}


def fed(port: ForeignPort, ids: np.ndarray, past: int) -> np.ndarray:
    """What an input is fed, of ids [1, S] after `past` tokens."""
    return np.ascontiguousarray(FEEDS[port.name](ids, past).astype(port.dtype))
