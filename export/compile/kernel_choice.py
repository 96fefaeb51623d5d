"""Which form of a product is fastest on this CPU: each is timed, by the ops and weights that a bundle has.

Forms: `fp32`, weights as they are; `blocks`, MatMulNBits over a scale for each block of a row, which rounds
activations of a block to int8; `channels`, int8 by int8 with one scale a row of either side. Shapes: M token
rows, N rows and K columns of the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from stillgraph.compiled import Form, ProductTime
from stillgraph.exporter.compile.product_times import ms_of
from stillgraph.exporter.ir.fold_weights import Recipe
from stillgraph.exporter.ort import session_options
from stillgraph.exporter.precisions import PRECISIONS
from stillgraph.exporter.quantize import nodes as ops
from stillgraph.exporter.quantize.int8_rows import int8_product
from stillgraph.exporter.quantize.layouts import Matrix, Part
from stillgraph.exporter.quantize.lower import IR_VERSION
from stillgraph.exporter.quantize.rounding import Format, Quantized, quantize
from stillgraph.exporter.targets import MICROSOFT, TARGETS
from stillgraph.manifest import GraphEntry, Manifest

# Enough matrices that none is in a cache of the CPU when its turn comes again, as in a step of a model.
STREAMED = 96 << 20  # bytes
MOST = 16  # matrices
SECONDS = 0.4  # of each form and M
WIDENED = "DequantizeLinear"  # before a product of the portable target, which ONNX Runtime makes one op of
Shape = tuple[int, int]  # N, K


def time_products(manifest: Manifest, shape: Shape, rows: list[int], threads: int) -> list[ProductTime]:
    """The median time of one product [M, K] x [K, N] in each form, for each M of `rows`.

    Forms take turns, so that other load on the machine affects all of them equally.
    """
    found = []
    for count in rows:
        runs = {form: _runner(manifest, form, shape, count, threads) for form in forms(manifest)}
        times = {form: list[float]() for form in runs}
        for run, _ in runs.values():
            run()
        until = time.perf_counter() + SECONDS * len(runs)
        while time.perf_counter() < until:
            for form, (run, copies) in runs.items():
                began = time.perf_counter()
                run()
                times[form].append((time.perf_counter() - began) / copies * 1e3)
        found += [ProductTime(form=form, rows=count, ms=statistics.median(times[form])) for form in runs]
    return found


def forms(manifest: Manifest) -> tuple[Form, ...]:
    """The forms to time for a bundle."""
    if manifest.quantization is None:
        return ("fp32",)
    return ("fp32", "blocks", "channels") if TARGETS[manifest.target].own_ops else ("fp32", "blocks")


def form_of(entry: GraphEntry, manifest: Manifest) -> Form:
    """The form of a graph's products."""
    if manifest.quantization is None:
        return "fp32"
    return "channels" if entry.shape.int8_activations else "blocks"


def choose(manifest: Manifest, times: list[ProductTime]) -> list[GraphEntry]:
    """The graphs to compile: of two prefills the one whose form is faster at its number of tokens."""
    chosen = []
    for entry in manifest.graphs.values():
        others = manifest.all_of(entry.shape.role)
        if len(others) == 1 or entry == min(others, key=lambda other: _ms(other, manifest, times)):
            chosen.append(entry)
    return chosen


def _ms(entry: GraphEntry, manifest: Manifest, times: list[ProductTime]) -> float:
    return ms_of(times, form_of(entry, manifest), entry.shape.max_len)


def advice(manifest: Manifest, times: list[ProductTime]) -> str | None:
    """A sentence on what would be faster and is not in the bundle, with the option that puts it there."""
    prefills = manifest.all_of("prefill")
    if manifest.quantization is None or not TARGETS[manifest.target].own_ops or not prefills:
        return None
    max_len = prefills[0].shape.max_len
    share = ms_of(times, "channels", max_len) / ms_of(times, "blocks", max_len)
    if any(entry.shape.int8_activations for entry in prefills) or share > 0.9:
        return None
    return (
        f"a prefill of int8 activations would take {share:.2f} of the time of these products here:"
        " export with --fast-prefill to have it"
    )


def largest_product(graph: onnx.GraphProto, vocabulary: int) -> Shape | None:
    """The largest matrix of a layer that a graph multiplies with; the head, of `vocabulary` rows, is none."""
    return max(
        (shape for shape in _products(graph) if shape[0] != vocabulary),
        key=lambda shape: shape[0] * shape[1],
        default=None,
    )


def _products(graph: onnx.GraphProto) -> Iterator[Shape]:
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    widened = {node.output[0]: sizes.get(node.input[0], ()) for node in graph.node if node.op_type == WIDENED}
    sizes |= widened
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            values = {attribute.name: attribute.i for attribute in node.attribute}
            yield values["N"], values["K"]
        elif node.op_type in ("MatMul", "MatMulIntegerToFloat") and len(sizes.get(node.input[1], ())) == 2:
            yield sizes[node.input[1]][1], sizes[node.input[1]][0]


def _runner(
    manifest: Manifest, form: Form, shape: Shape, rows: int, threads: int
) -> tuple[Callable[[], object], int]:
    """A call that multiplies with several matrices one after the other, and their number."""
    copies = int(min(MOST, max(1, STREAMED // (shape[0] * shape[1] * BYTES[form]))))
    model = _model(manifest, form, shape, rows, copies)
    options = session_options()
    options.intra_op_num_threads = threads
    # Its threads would spin on for a while and take the cores from the form whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if form == "fp32":  # as the runtime has them: mapped, as they are
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((1, rows, shape[1]), np.float32)
    return lambda: session.run(None, {"x": x}), copies


BYTES: dict[Form, float] = {"fp32": 4, "blocks": 0.5, "channels": 1}  # of a weight, at least


def _model(manifest: Manifest, form: Form, shape: Shape, rows: int, copies: int) -> ir.Model:
    """x [1, M, K] times each of `copies` matrices."""
    x = ir.Value(name="x", shape=ir.Shape((1, rows, shape[1])), type=ir.TensorType(ir.DataType.FLOAT))
    imports = {"": 20, MICROSOFT: 1}
    graph = ir.Graph([x], [], nodes=[], opset_imports=imports, name="products")
    builder = ops.Builder(graph)
    weights = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    stored = None if form == "fp32" else quantize(weights, _format(manifest, form, shape))
    for copy in range(copies):
        result = _product(builder, x, f"w{copy}", weights, stored)
        graph.outputs.append(result)
    builder.append_to_graph()
    for name, part in builder.parts.items():
        assert stored is not None
        _store(graph, name, part, stored)
    return ir.Model(graph, ir_version=IR_VERSION)


def _format(manifest: Manifest, form: Form, shape: Shape) -> Format:
    how = manifest.quantization
    assert how is not None
    if form == "channels":
        return Format.channel(shape[1])
    return Format(PRECISIONS[manifest.precision].bits or 8, how.block_size, how.symmetric)


def _product(
    builder: ops.Builder, x: ir.Value, name: str, weights: torch.Tensor, stored: Quantized | None
) -> ir.Value:
    shape = tuple(weights.shape)
    if stored is None:
        matrix = builder.constant(weights.T.contiguous().numpy().copy(), shared=False)
        return builder.op("MatMul", [x, matrix], (*ops.shape_of(x)[:-1], shape[0]))
    product = int8_product if stored.form.pair_safe else ops.blocked_product
    return product(builder, x, Matrix(Recipe((name,), shape), stored.form))


def _store(graph: ir.Graph, name: str, part: Part, stored: Quantized) -> None:
    """Turn the input of a part into an initializer with the bytes of `stored`."""
    value = next(value for value in graph.inputs if value.name == name)
    graph.inputs.remove(value)
    array = np.ascontiguousarray(part.pack(stored).numpy().reshape(part.shape))
    if part.dtype == ir.DataType.INT8:
        array = array.view(np.int8)
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
