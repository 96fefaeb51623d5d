"""Weights of few bits in a graph: products with a weight, and the embedding, read quantized ones instead."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from stillgraph.exporter.ir.fold_weights import Recipe, Weight
from stillgraph.exporter.precisions import CALIBRATED, PRECISIONS, QUANTIZED
from stillgraph.exporter.quantize import nodes as ops
from stillgraph.exporter.quantize.int8_rows import int8_product
from stillgraph.exporter.quantize.layouts import Matrix, matrix_of
from stillgraph.exporter.quantize.refined_head import refined_rows, refined_scores
from stillgraph.exporter.quantize.rounding import Format
from stillgraph.exporter.targets import TARGETS
from stillgraph.manifest import Precision, Quantization, Target
from stillgraph.spec import GraphShape

HEAD = "lm_head.weight"  # what a tied embedding is called as well
LEAST_HEAD = 16  # times the rows that are refined: with fewer to leave out nothing is gained
NESTED_BLOCK = 32  # the upper four bits are not searched: larger ones lose twice as much on SmolLM2-135M
WIDER = 8  # bits of a weight that is worth more than four
IR_VERSION = 10  # the first with types of four bits


@dataclass(frozen=True)
class StoragePlan:
    """How the weights of one graph are stored.

    fast: products of more than one token a row take int8 activations, one scale a token, and int8 weights,
    one scale an output channel: about twice as fast, by weights that no other graph shares, but for those
    that the quantization calls blocked. tied: the tensor
    that is embedding and head in one, of which a graph may have either. tower: tables, which are of
    positions, stay as they are.
    """

    target: Target
    precision: Precision
    quantization: Quantization
    fast: bool = False
    tied: str | None = None
    tower: bool = False

    @classmethod
    def of(
        cls,
        target: Target,
        precision: Precision,
        quantization: Quantization,
        shape: GraphShape,
        tied: str | None,
    ) -> StoragePlan:
        """The plan of a graph: a tower's products are of int8, whatever the decoder's are."""
        tower = shape.role == "vision"
        return cls(target, "int8" if tower else precision, quantization, shape.int8_activations, tied, tower)

    def splits_mlp(self, shape: GraphShape) -> bool:
        """Whether gate and up are to be two products: one for both would only be split again.

        A fast graph quantizes an input once for all its products. What is kept in fp32 stays one matrix,
        which the decode graph reads as well.
        """
        return self.fast and shape.max_len > 1 and "fp32" not in self.quantization.keep.values()

    def alike(self, name: str, shape: GraphShape) -> Hashable:
        """Equal for weights of the decoder that are one product in a graph where they have one input."""
        alone = name if ".up_proj." in name and self.splits_mlp(shape) else None
        return self.precision_of((name,)), self.fast and self.is_blocked((name,)), alone

    def is_blocked(self, sources: Iterable[str]) -> bool:
        """Whether a fast graph, too, multiplies with these tensors of the checkpoint in blocks."""
        return any(source.removesuffix(".weight") in self.quantization.blocked for source in sources)

    def precision_of(self, sources: Iterable[str], tied: bool = False) -> Precision:
        """What a weight made of these tensors of the checkpoint is stored in.

        A pattern (as of `fnmatch`) names whole dotted parts anywhere in a name: `lm_head`, `down_proj`,
        `layers.0`, `layers.[0-3].mlp`. tied: the weight is embedding and head, and has both names. The last
        pattern that matches a tensor decides; of tensors that are one product, the highest precision.
        """
        names = [(source, HEAD) if tied else (source,) for source in sources]
        return max((self._one(aliases) for aliases in names), key=lambda one: PRECISIONS[one].bits or 32)

    def _one(self, names: Sequence[str]) -> Precision:
        kept = [
            precision
            for pattern, precision in (*self.quantization.better.items(), *self.quantization.keep.items())
            if any(fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*") for name in names)
        ]
        return kept[-1] if kept else self.precision

    def form(self, precision: Precision, nested: bool = False) -> Format:
        bits, how = PRECISIONS[precision].bits, self.quantization
        assert bits is not None
        if nested:
            return Format(bits, NESTED_BLOCK, nested=True)
        # Beside four bits, eight need no zero points, nor scales that one target alone takes.
        wider = self.precision == CALIBRATED and bits == WIDER
        positive = not TARGETS[self.target].signed_scales
        return Format(bits, how.block_size, how.symmetric or wider, positive or wider)

    def form_for(self, sources: tuple[str, ...], rows: int, tied: bool) -> Format | None:
        """How a weight is stored; None where its numbers stay as they are. tied: as for `precision_of`."""
        precision, refine = self.precision_of(sources, tied), self.quantization.refine
        if precision not in QUANTIZED:
            return None
        refined = bool(refine) and (tied or sources == (HEAD,)) and rows >= LEAST_HEAD * refine
        return self.form(precision, nested=refined and self.precision == CALIBRATED and precision == "int8")


def lower(model: ir.Model, recipes: Sequence[Weight], plan: StoragePlan) -> list[Weight]:
    """Rewrite a graph whose weights are inputs, as `take_out` left it; return the weights it reads then.

    Products of a right side that a recipe makes ([K, N]), and `Gather`s of rows of such a one, are rewritten
    where the plan stores it in few bits; nodes that nothing reads then are removed, all else stays. Every new
    value has its shape and dtype.
    """
    graph = model.graph
    by_name = {recipe.name: recipe for recipe in recipes if isinstance(recipe, Recipe)}
    sites = list(_sites(graph, by_name))
    gathered = {matrix.recipe.sources for node, matrix in sites if node.op_type == "Gather"}
    head = {matrix.recipe.sources for node, matrix in sites if node.op_type == "MatMul"}
    builder = ops.Builder(graph)
    for node, matrix in sites:
        sources = matrix.recipe.sources
        tied = sources in gathered & head or sources == (plan.tied,)
        form = plan.form_for(sources, matrix.rows, tied)
        if form is not None and not (plan.tower and node.op_type == "Gather"):
            _replace(builder, node, Matrix(matrix.recipe, form), plan)
    common.RemoveUnusedNodesPass()(model)
    _declare(model, plan)
    return _still_read(graph, recipes, builder)


def _sites(graph: ir.Graph, recipes: dict[str, Recipe]) -> Iterator[tuple[ir.Node, Matrix]]:
    """Nodes that read a matrix of weights, and the matrix as [N, K]; its form is not decided yet."""
    undecided = Format(8, 1)
    for node in graph:
        if node.op_type not in ("MatMul", "Gather") or len(node.inputs) < 2:
            continue
        product = node.op_type == "MatMul"
        value = node.inputs[1 if product else 0]
        recipe = recipes.get(value.name or "") if value is not None else None
        if recipe is None or recipe.constant is not None or len(recipe.shape) != 2:
            continue
        if product:
            yield node, matrix_of(recipe, undecided)
        elif "axis" not in node.attributes or node.attributes["axis"].as_int() == 0:
            yield node, Matrix(recipe, undecided)


def _replace(builder: ops.Builder, node: ir.Node, matrix: Matrix, plan: StoragePlan) -> None:
    operand = node.inputs[0 if node.op_type == "MatMul" else 1]
    assert operand is not None
    shape, own_ops = ops.shape_of(operand), TARGETS[plan.target].own_ops
    if node.op_type == "Gather":
        gather = ops.gather_table if own_ops else ops.gather_columns
        result = (refined_rows if matrix.form.nested else gather)(builder, operand, matrix)
    elif matrix.form.nested:
        result = refined_scores(builder, operand, matrix, plan.quantization.refine)
    elif not own_ops:
        result = ops.dequantized_product(builder, operand, matrix)
    elif plan.fast and shape[-2] > 1 and not plan.is_blocked(matrix.recipe.sources):
        channels = Matrix(matrix.recipe, Format.channel(matrix.columns))
        result = int8_product(builder, operand, channels)
    else:
        result = ops.blocked_product(builder, operand, matrix)
    builder.put_in_place_of(node, result)


def _declare(model: ir.Model, plan: StoragePlan) -> None:
    domain, version = TARGETS[plan.target].few_bits
    model.graph.opset_imports[domain] = max(version, model.graph.opset_imports.get(domain, 0))
    model.ir_version = max(model.ir_version, IR_VERSION)


def _still_read(graph: ir.Graph, recipes: Sequence[Weight], builder: ops.Builder) -> list[Weight]:
    """The weights that nodes read, old and new; inputs that none reads are removed."""
    unread = {value.name for value in graph.inputs if not value.uses()}
    old = [recipe for recipe in recipes if recipe.name not in unread]
    dropped = {recipe.name for recipe in recipes} & unread
    for value in [value for value in graph.inputs if value.name in dropped]:
        graph.inputs.remove(value)
    return [*old, *builder.parts.values()]
