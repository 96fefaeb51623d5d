"""What is in a bundle: files, ops, memory, valid ranges, the last validation. No weight is read.

Shapes: B batch, KV key/value heads, C cache slots, D head size.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx

from stillgraph.compiled import Found, Products, find
from stillgraph.errors import StillgraphError
from stillgraph.files import check_files
from stillgraph.manifest import GraphEntry, Manifest, Quantization, Validation, read
from stillgraph.ports import ITEM_SIZE
from stillgraph.spec import Frozen, GraphShape, LayerSpec, cache_shape

STAGE = "inspect"
ITEM_BITS = {"FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT64": 64, "UINT64": 64, "BOOL": 8, "INT8": 8,
             "UINT8": 8, "INT16": 16, "UINT16": 16, "INT4": 4, "UINT4": 4}  # fmt: skip


class Activation(Frozen):
    """An intermediate value of a graph and the op that makes it."""

    name: str
    op: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class GraphInspection(Frozen):
    """One graph: its shape, how often each op occurs, and the largest value inside it."""

    shape: GraphShape
    nbytes: int
    nodes: int
    ops: dict[str, int]
    largest_activation: Activation | None


class LayerCache(LayerSpec):
    """A layer, and its keys and values: slots, and the bytes of both buffers; none where it has kv_from."""

    capacity: int
    nbytes: int


class MemoryUse(Frozen):
    """Bytes of the weights, and of one set of key/value buffers by layer and in all."""

    weights: int
    layers: tuple[LayerCache, ...]
    cache: int


class Ranges(Frozen):
    """What the graphs take: token ids below `vocabulary`, `max_len` tokens a call, `ctx` in the cache."""

    batch: int
    vocabulary: int
    max_len: int | None
    continues_cache: bool
    ctx: int | None


class Inspection(Frozen):
    """Everything `stillgraph inspect` shows. compiled: the folder for this machine, or why it is not used;
    products: what was timed for it."""

    bundle: str
    model: str
    architecture: str
    checkpoint_sha256: str
    target: str
    precision: str
    quantization: Quantization | None
    compiled: str | None
    products: Products | None
    tools: dict[str, str]
    files: dict[str, int]
    graphs: dict[str, GraphInspection]
    memory: MemoryUse
    ranges: Ranges
    validation: Validation | None


def inspect(bundle: Path) -> Inspection:
    """Look into a bundle. Raises StillgraphError where it is not whole."""
    manifest = read(bundle)
    check_files(bundle, manifest)
    found = find(bundle, manifest)
    return Inspection(
        bundle=str(bundle),
        model=manifest.source.id,
        architecture=manifest.model.architecture,
        checkpoint_sha256=manifest.source.checkpoint_sha256,
        target=manifest.target,
        precision=manifest.precision,
        quantization=manifest.quantization,
        compiled=_compiled(found),
        products=found.compiled.products if found.compiled else None,
        tools=manifest.tools,
        files={file.path: file.nbytes for file in manifest.all_files()},
        graphs={name: _graph(bundle, entry) for name, entry in manifest.graphs.items()},
        memory=_memory(manifest),
        ranges=_ranges(manifest),
        validation=manifest.validation,
    )


def _graph(bundle: Path, entry: GraphEntry) -> GraphInspection:
    path = bundle / entry.file.path
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # the protobuf parser raises undocumented exceptions
        problem = f"{path} is not an ONNX graph ({' '.join(str(error).split())})"
        raise StillgraphError(STAGE, problem, "export the bundle again") from error
    return GraphInspection(
        shape=entry.shape,
        nbytes=entry.file.nbytes,
        nodes=len(graph.node),
        ops=dict(Counter(_op(node) for node in graph.node).most_common()),
        largest_activation=None if entry.shape.grows else largest_activation(graph),
    )


def _op(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def largest_activation(graph: onnx.GraphProto) -> Activation | None:
    """The largest node output that is no graph output, by the shapes in the file; or None."""
    makers = {name: _op(node) for node in graph.node for name in node.output}
    found = [_activation(value, makers[value.name]) for value in graph.value_info if value.name in makers]
    return max(found, key=lambda activation: activation.nbytes, default=None)


def _activation(value: onnx.ValueInfoProto, op: str) -> Activation:
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
    shape = tuple(dim.dim_value for dim in tensor.shape.dim)
    nbytes = -(-math.prod(shape) * ITEM_BITS.get(dtype, 32) // 8)
    return Activation(name=value.name, op=op, dtype=dtype.lower(), shape=shape, nbytes=nbytes)


def _memory(manifest: Manifest) -> MemoryUse:
    entry = manifest.graph("decode") or manifest.graph("prefill") or manifest.graph("dynamic")
    layers = _caches(manifest, entry) if entry else ()
    cache = sum(layer.nbytes for layer in layers)
    return MemoryUse(weights=manifest.weights.file.nbytes, layers=layers, cache=cache)


def _caches(manifest: Manifest, entry: GraphEntry) -> tuple[LayerCache, ...]:
    """Per layer, of the buffers that the graph reads, or writes where it reads none; at ctx."""
    item = 2 * ITEM_SIZE["float32"]  # of keys and values
    sizes = {index: cache_shape(manifest.model, entry.shape, index) for index in manifest.model.cached}
    return tuple(
        LayerCache(
            **layer.model_dump(),
            capacity=sizes[index][2] if index in sizes else 0,
            nbytes=item * math.prod(sizes.get(index, (0,))),
        )
        for index, layer in enumerate(manifest.model.layers)
    )


def _ranges(manifest: Manifest) -> Ranges:
    dynamic = manifest.graph("dynamic")  # which is both
    prefill, decode = manifest.graph("prefill") or dynamic, manifest.graph("decode") or dynamic
    entry = decode or prefill
    return Ranges(
        batch=entry.shape.batch if entry else 1,
        vocabulary=manifest.model.vocab_size,
        max_len=prefill.shape.max_len if prefill else None,
        continues_cache=prefill is not None and prefill.shape.ctx is not None,
        ctx=entry.shape.ctx if entry else None,
    )


def _compiled(found: Found) -> str | None:
    made = found.compiled
    return f"for {made.cpu}, ONNX Runtime {made.onnxruntime}" if made else found.reason
