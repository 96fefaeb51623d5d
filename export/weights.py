"""Weights: what each graph needs, made from the checkpoint tensor by tensor, once, into one file.

A trace leaves small computations on weights in the graph: a transposition before each product, 1 + w of a
norm, a cast. They are taken out of the graph and written down as a recipe, and carried out when the weight
is written, so no graph ever holds a weight and no more than one is in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from runtime.manifest import File, Weights, WeightTensor

WEIGHTS_FILE = "weights.data"
ALIGNMENT = 4096  # a page, so that each tensor can be mapped by itself
SUBGRAPH_BYTES = 1024  # constants up to this size stay in the graph
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


@dataclass(frozen=True)
class Step:
    """One operation on a weight: `Transpose` by a permutation, `Cast` to a dtype, `Add` or `Mul` a number."""

    op: str
    argument: tuple[int, ...] | float | ir.DataType

    def run(self, tensor: torch.Tensor) -> torch.Tensor:
        match self.argument:
            case tuple() as permutation:
                return tensor.permute(permutation)
            case ir.DataType() as dtype:
                return tensor.to(TORCH_DTYPES[dtype])
            case number:
                return tensor + number if self.op == "Add" else tensor * number


@dataclass(frozen=True)
class Recipe:
    """A weight of a graph: the checkpoint's tensor, widened to fp32, and the steps that make it."""

    source: str
    shape: tuple[int, ...]
    dtype: ir.DataType = ir.DataType.FLOAT
    steps: tuple[Step, ...] = ()
    constant: np.ndarray | None = field(default=None, compare=False)  # a weight of the trace's own, no source

    @property
    def name(self) -> str:
        """The weight's name in every graph: its source, and each step in short."""
        return ".".join([self.source, *(step.op.lower() for step in self.steps)])

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.bitwidth // 8

    def make(self, tensor: Callable[[str], torch.Tensor]) -> np.ndarray:
        """The finished weight, C-contiguous, with `tensor` giving a checkpoint tensor by name."""
        if self.constant is not None:
            return self.constant
        value = tensor(self.source).to(torch.float32)
        for step in self.steps:
            value = step.run(value)
        return value.contiguous().numpy()


def take_out(model: ir.Model, names: Iterable[str]) -> list[Recipe]:
    """Replace weights, and what is computed from a single weight, by graph inputs; return their recipes.

    names: the initializers that are weights. Inputs are named by `Recipe.name`; `attach` turns them back into
    initializers that point into the weights file.
    """
    graph = model.graph
    recipes: dict[str, tuple[Recipe, ir.Value]] = {}

    def place(recipe: Recipe, old: ir.Value) -> None:
        if recipe.name not in recipes:
            value = ir.Value(name=recipe.name, shape=ir.Shape(recipe.shape), type=ir.TensorType(recipe.dtype))
            recipes[recipe.name] = recipe, value
        old.replace_all_uses_with(recipes[recipe.name][1])

    for name in names:
        if (value := graph.initializers.pop(name, None)) is not None:
            assert value.shape is not None
            value.name = None
            place(Recipe(name, tuple(value.shape.numpy())), value)
    by_value = {id(value): recipe for recipe, value in recipes.values()}
    for node in list(graph):
        recipe = _extended(node, by_value)
        if recipe is not None:
            place(recipe, node.outputs[0])
            by_value[id(recipes[recipe.name][1])] = recipe
            graph.remove(node, safe=True)
    used = [(recipe, value) for recipe, value in recipes.values() if value.uses()]
    graph.inputs.extend(value for _, value in used)
    return [recipe for recipe, _ in used]


def _extended(node: ir.Node, known: dict[int, Recipe]) -> Recipe | None:
    """The recipe of a node's output where its input is one weight and perhaps one number, else None."""
    recipe = next((known[id(value)] for value in node.inputs if id(value) in known), None)
    if recipe is None:
        return None
    if node.op_type == "Transpose":
        permutation = tuple(node.attributes["perm"].as_ints())
        shape = tuple(recipe.shape[axis] for axis in permutation)
        return Recipe(recipe.source, shape, recipe.dtype, (*recipe.steps, Step("Transpose", permutation)))
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
        if dtype == recipe.dtype:
            return recipe
        return Recipe(recipe.source, recipe.shape, dtype, (*recipe.steps, Step("Cast", dtype)))
    if node.op_type in ("Add", "Mul"):
        numbers = [ir.convenience.get_const_tensor(value) for value in node.inputs if value is not None]
        number = next((tensor for tensor in numbers if tensor is not None and tensor.size == 1), None)
        if number is not None:
            step = Step(node.op_type, float(number.numpy().item()))
            return Recipe(recipe.source, recipe.shape, recipe.dtype, (*recipe.steps, step))
    return None


def take_out_constants(model: ir.Model) -> list[Recipe]:
    """Like `take_out`, for large constants of the trace itself; small ones stay in the graph."""
    recipes = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= SUBGRAPH_BYTES:
            continue
        array = np.ascontiguousarray(tensor.numpy())
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:12]
        recipe = Recipe(f"constant.{digest}", array.shape, tensor.dtype, constant=array)
        del model.graph.initializers[name]
        value.const_value = None
        value.name = recipe.name
        model.graph.inputs.append(value)
        recipes.append(recipe)
    return recipes


def layout(recipes: Iterable[Recipe], start: int = 0) -> dict[str, WeightTensor]:
    """Where each weight goes in a file whose first `start` bytes are taken: one page-aligned place each."""
    tensors, end = {}, start
    for recipe in sorted(recipes, key=lambda recipe: recipe.name):
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        end = offset + recipe.nbytes
        tensors[recipe.name] = WeightTensor(
            offset=offset, nbytes=recipe.nbytes, dtype=recipe.dtype.name, shape=recipe.shape
        )
    return tensors


def write(
    folder: Path,
    recipes: list[Recipe],
    tensor: Callable[[str], torch.Tensor],
    former: Weights | None = None,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Weights:
    """Add the weights that `former` lacks to the folder's weights file, one at a time.

    The file of `former`, if given, must already be a private copy in `folder`. advance is called with the
    bytes written. Peak memory is that of the largest weight, as read and as written.
    """
    path = folder / WEIGHTS_FILE
    known = dict(former.tensors) if former else {}
    missing = {recipe.name: recipe for recipe in recipes if recipe.name not in known}
    if former is not None and not missing:
        return former
    start = path.stat().st_size if former else 0
    placed = layout(missing.values(), start)
    digest = hashlib.sha256()
    if former:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    with path.open("ab") as stream:
        for name, place in placed.items():
            padding = b"\0" * (place.offset - stream.tell())
            content = missing[name].make(tensor).reshape(-1).view(np.uint8).data
            for part in (padding, content):
                digest.update(part)
                stream.write(part)
            advance(place.nbytes)
    file = File(path=WEIGHTS_FILE, nbytes=path.stat().st_size, sha256=digest.hexdigest())
    return Weights(file=file, tensors=known | placed)


def attach(model: ir.Model, weights: Weights) -> None:
    """Turn the inputs named as weights into initializers that point into the weights file."""
    graph = model.graph
    for value in list(graph.inputs):
        place = weights.tensors.get(value.name or "")
        if place is None:
            continue
        graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            weights.file.path,
            place.offset,
            place.nbytes,
            ir.DataType[place.dtype],
            shape=ir.Shape(place.shape),
            name=value.name or "",
        )
        graph.initializers.add(value)


def detach(model: ir.Model) -> None:
    """The reverse of `attach`: weights become inputs, and the graph is structure only."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor):
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
