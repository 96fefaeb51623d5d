"""Trace a graph with torch and give it the names and fixed shapes of its spec."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.fx.config
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.ir.node_names import name_by_module
from stillgraph.exporter.targets import TARGETS
from stillgraph.exporter.tensor_files import parameter_names
from stillgraph.exporter.trace.attention import portable_attention
from stillgraph.exporter.trace.graphs import GRAPHS
from stillgraph.exporter.trace.half_range import keep_fp32
from stillgraph.manifest import Precision, Target
from stillgraph.patches.direct_lowering import DIRECT_LOWERING
from stillgraph.patches.half_weights import half_linear
from stillgraph.patches.patch import Patch, applied
from stillgraph.patches.side_by_side import mark
from stillgraph.patches.torchlib_registry import TORCHLIB_REGISTRY
from stillgraph.ports import NEW, PAST, Port, input_ports, output_ports
from stillgraph.spec import GraphShape

ATTENTION = "stillgraph_portable"
PARAMETER_PREFIX = "model."  # of the wrapper's attribute that holds the model
EXPORTER = (TORCHLIB_REGISTRY, DIRECT_LOWERING)  # what makes the exporter faster and changes no graph
EXAMPLE_LENGTHS = {NEW: 3, PAST: 5}  # torch.export would take 0 and 1 for constants


def convert(
    checkpoint: Checkpoint,
    shape: GraphShape,
    target: Target,
    precision: Precision,
    kept_fp32: Collection[str] = (),
    alike: Callable[[str], Hashable] = lambda name: None,
) -> ir.Model:
    """One graph of a checkpoint as ONNX; its weights are initializers with the checkpoint's tensor names.

    kept_fp32: linear modules that stay so in fp16; alike: of a weight's name, equal for those that may be
    one product where they have one input. The weights' contents are not those of the checkpoint: the model
    is traced over untouched memory.
    """
    spec = checkpoint.spec
    inputs, outputs = input_ports(spec, shape), output_ports(spec, shape)
    patches = _patches(checkpoint, shape, target, precision)
    # Without gradients, a model's own `no_grad` is no block of its own in the graph.
    with registered_attention(), applied((*patches, *EXPORTER)), quiet(), lean(), torch.no_grad():
        model = checkpoint.build(ATTENTION)
        keep_fp32(model, kept_fp32)
        mark(model, alike)
        module = GRAPHS[shape.role](model, checkpoint.family, spec, shape).eval()
        program = torch.onnx.export(
            module,
            tuple(example(port) for port in inputs),
            dynamo=True,
            opset_version=TARGETS[target].opset,
            optimize=False,  # folding would read weights that are not there
            verbose=False,
            dynamic_shapes=lengths(inputs) if shape.grows else None,
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
        )
    assert program is not None
    if shape.grows:  # the tracer calls the length of the outputs by a formula
        for value, port in zip(program.model.graph.outputs, outputs, strict=True):
            value.shape = ir.Shape(port.shape)
    _name_weights(program.model, parameter_names(model))
    name_by_module(program.model)
    return program.model


def example(port: Port) -> torch.Tensor:
    """A tensor of a port's shape, for tracing: lengths of 1, ids and caches of 0."""
    value = 1 if port.role in ("valid_length", "past_length") else 0
    return torch.full(port.at(EXAMPLE_LENGTHS), value, dtype=getattr(torch, port.dtype))


def lengths(inputs: Sequence[Port]) -> tuple[object, ...]:
    """Which sizes are lengths, as `torch.export` wants it: of the first input, and of all others as one."""
    dims = {name: torch.export.Dim(name, min=0) for name in EXAMPLE_LENGTHS}
    first, *rest = [
        {axis: dims[size] for axis, size in enumerate(port.shape) if isinstance(size, str)} for port in inputs
    ]
    return first, tuple(rest)


def _patches(
    checkpoint: Checkpoint, shape: GraphShape, target: Target, precision: Precision
) -> tuple[Patch, ...]:
    """A family's patches are of its decoder; a tower is traced as it is, its matrices in fp16 at most."""
    if shape.role == "vision":
        return (half_linear(torch.nn.Linear),) if precision == "fp16" else ()
    return checkpoint.family.patches(checkpoint.config, target, precision)


def _name_weights(model: ir.Model, names: dict[str, str]) -> None:
    initializers = model.graph.initializers
    for traced, value in list(initializers.items()):
        if (name := names.get(traced.removeprefix(PARAMETER_PREFIX))) is None:
            continue
        del initializers[traced]
        if name in initializers:  # the head of a tied pair
            value.replace_all_uses_with(initializers[name])
        else:
            value.name = name
            initializers[name] = value


@contextlib.contextmanager
def registered_attention() -> Iterator[None]:
    """Our attention under its name in transformers' attention interface, for the length of a `with` block."""
    functions: Any = ALL_ATTENTION_FUNCTIONS
    functions[ATTENTION] = portable_attention
    try:
        yield
    finally:
        del functions[ATTENTION]


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Without what a trace spends a third of its time on and no ONNX graph keeps: the Python stack of each
    node, and Python code of each version of the graph."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings on optional packages and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
