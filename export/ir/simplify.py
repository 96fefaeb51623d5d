"""Make a traced graph small, and check what came out. Works on the structure; weights are inputs here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import onnxsim
from onnx_ir.passes import common
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as common_rules

from stillgraph.errors import CheckFailed
from stillgraph.exporter.ort import SAME, Empty, difference, empty_in, open_graph, run
from stillgraph.manifest import Alias
from stillgraph.metrics import peak_rss_mb
from stillgraph.ports import NEW, PAST
from stillgraph.spec import Frozen

FORBIDDEN = frozenset(
    "If Loop Scan NonZero Unique Optional SequenceAt SequenceConstruct SequenceEmpty SequenceInsert"
    " SequenceMap SplitToSequence ConcatFromSequence".split()
)

LENGTHS = {NEW: 3, PAST: 5}  # at which a dynamic graph is compared with itself


@dataclass(frozen=True)
class StepReport:
    """One step: nodes before and after, its seconds, and the process's peak memory in MB when it ended."""

    step: str
    nodes_before: int
    nodes_after: int
    seconds: float
    peak_rss_mb: float | None


# Of onnxscript's 60 rules, those that find something here: all of them take three times as long.
RULES = (common_rules.collapse_slice_rule, common_rules.collapse_slice2_rule,
         common_rules.materialize_reshape_shape_rule)  # fmt: skip


def fold(model: ir.Model) -> ir.Model:
    """Constants, shapes and no-ops folded away by onnxscript."""
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, input_size_limit=1 << 16, output_size_limit=1 << 22)
    RewritePass(RULES)(model)
    return model


def simplify_structure(model: ir.Model) -> ir.Model:
    """onnxsim on the structure. Its check would run the model with random weights; ours runs the real one."""
    simplified, _ = onnxsim.simplify(ir.to_proto(model), check_n=0)
    structure: ir.Model = ir.from_proto(simplified)
    return structure


def tidy(model: ir.Model) -> ir.Model:
    """Equal subexpressions once, equal constants once, nothing unused, metadata of the trace gone."""
    passes = ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.DeduplicateInitializersPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
        common.TopologicalSortPass(),
    )
    return passes(model).model


STEPS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "fold": fold,
    "onnxsim": simplify_structure,
    "tidy": tidy,
}


def simplify(model: ir.Model, dynamic: bool = False) -> tuple[ir.Model, list[StepReport]]:
    """Run every step; raises CheckFailed where the result is not a static graph of allowed ops.

    dynamic: the graph is meant to have lengths in place of numbers.
    """
    reports = []
    for name, step in STEPS.items():
        before, start = len(model.graph), time.perf_counter()
        model = step(model)
        seconds = round(time.perf_counter() - start, 3)
        reports.append(StepReport(name, before, len(model.graph), seconds, peak_rss_mb()))
    model = check(model, dynamic)
    return model, reports


def primitive(model: ir.Model) -> ir.Model:
    """A copy of a trace whose nodes all have a kernel in ONNX Runtime. It runs what has none behind all else,
    and would hold every weight that it widened until then."""
    proto = onnx.inliner.inline_selected_functions(
        ir.to_proto(model), [("", "CastLike")], inline_schema_functions=True
    )
    copy: ir.Model = ir.from_proto(proto)
    return copy


def check(model: ir.Model, dynamic: bool = False) -> ir.Model:
    """The model with its shapes inferred; it passed onnx.checker, has allowed ops and, unless dynamic, static
    shapes."""
    proto = ir.to_proto(model)
    for function in list(proto.functions):
        raise CheckFailed(
            "simplify", f"the graph still calls function {function.name}", "please report this bug"
        )
    onnx.checker.check_model(proto)
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    if problem := (op_problem if dynamic else static_problem)(inferred.graph):
        raise CheckFailed("simplify", problem, "please report this bug")
    checked: ir.Model = ir.from_proto(inferred)
    return checked


def op_problem(graph: onnx.GraphProto) -> str | None:
    """The first op that is not allowed, in a sentence; or None."""
    for node in graph.node:
        if node.op_type in FORBIDDEN or any(a.HasField("g") or a.graphs for a in node.attribute):
            return f"node {node.name!r} is a {node.op_type}, which a static graph must not have"
    return None


def static_problem(graph: onnx.GraphProto) -> str | None:
    """The first op that is not allowed, or value whose shape is not all numbers, in a sentence; or None."""
    if problem := op_problem(graph):
        return problem
    shapes = {
        value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)
    }
    named = [(value.name, "the graph's inputs") for value in graph.input]
    named += [(name, node.op_type) for node in graph.node for name in node.output if name]
    for name, origin in named:
        tensor = shapes.get(name)
        if tensor is None or not tensor.HasField("shape"):
            return f"value {name!r} of {origin} has no shape"
        if any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
            return f"value {name!r} of {origin} has a dimension that is not a number"
    return None


def same_outputs(before: Path, after: Path, aliases: Sequence[Alias] = (), seed: int = 0) -> float:
    """Run two graph files on the same random inputs, without ONNX Runtime's own optimizations.

    aliases: of the graph's entry in the manifest. Returns the largest difference of any output, relative to
    that output's largest magnitude. Raises CheckFailed where it is over `SAME`. Caches lie in files beside
    `after`.
    """
    results, empty = [], empty_in(after.parent)
    for path in (before, after):
        session = open_graph(path, optimized=False)
        feeds = random_inputs(session, seed, empty)
        fixed = all(isinstance(size, int) for value in session.get_outputs() for size in value.shape)
        results.append(run(session, feeds, aliases, empty) if fixed else session.run(None, feeds))
        del session, feeds  # before the next
    differences = [difference(first, second) for first, second in zip(*results, strict=True)]
    worst = float(np.max(differences))  # a NaN stays one, which it does not in max()
    if not worst <= SAME:
        problem = f"{after.name} differs from the traced graph by {worst:.2e} of its largest value"
        raise CheckFailed("simplify", problem, "please report this bug")
    return worst


def random_inputs(session: ort.InferenceSession, seed: int, empty: Empty) -> dict[str, np.ndarray]:
    """Inputs within every graph's valid range: ids 0 to 9, lengths 1, caches normal."""
    rng = np.random.default_rng(seed)
    feeds = dict[str, np.ndarray]()
    for value in session.get_inputs():
        shape = [LENGTHS.get(size, size) for size in value.shape]
        if value.name.endswith("_length"):
            feeds[value.name] = np.ones(shape, np.int64)
        elif value.type == "tensor(int64)":
            feeds[value.name] = rng.integers(0, 10, shape)
        else:
            feeds[value.name] = empty(shape, np.float32)
            rng.standard_normal(out=feeds[value.name], dtype=np.float32)
    return feeds


class SimplifyReport(Frozen):
    """`reports/simplify.json`: the steps of each graph, and the largest difference before and after."""

    graphs: dict[str, list[dict[str, str | int | float]]]
    worst_difference: dict[str, float]


def as_report(steps: list[StepReport]) -> list[dict[str, str | int | float]]:
    return [asdict(step) for step in steps]
