"""Recipes: what a graph's weights are made of, taken out of the graph.

A trace leaves small computations on weights in the graph: a transposition before each product, 1 + w of a
norm, a cast, the weights of several products put together. They are taken out of the graph and written down
as a recipe, and carried out when the weight is written, so no graph ever holds a weight and no more than one
is in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from stillgraph.weight_tensor import Layout, WeightChange

SUBGRAPH_BYTES = 1024  # constants up to this size stay in the graph
CHUNK = 1 << 24  # numbers of a weight that are worked on at once
TORCH_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


def unrounded(name: str, form: Hashable) -> Any:
    """That nothing was rounded before."""
    return None


class Tensors:
    """A checkpoint's tensors by name, and the last thing that was made of them: its parts come one by one.

    rounded: a tensor as it was rounded before in some form, None where it was not.
    """

    def __init__(
        self,
        tensor: Callable[[str], torch.Tensor],
        rounded: Callable[[str, Any], Any] = unrounded,
    ) -> None:
        self.tensor, self.rounded = tensor, rounded
        self._key: Hashable = None
        self._made: Any = None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key; made again if another was asked for since. Holds one thing."""
        if self._made is None or key != self._key:
            self._made = None  # before the next is made
            self._key, self._made = key, make()
        return self._made


@dataclass(frozen=True)
class Origin:
    """What a weight is made of and how it is stored, as `stillgraph.weight_tensor.WeightTensor` says it."""

    sources: tuple[str, ...]
    changes: tuple[WeightChange, ...]
    bits: int
    layout: Layout = "plain"
    block: int | None = None


class Weight(Protocol):
    """What the weights file can hold: a recipe, or a part of a quantized one.

    content: the name of the weight with the same bytes that is stored; its own name where there is no other.
    """

    @property
    def name(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> ir.DataType: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def origin(self) -> Origin: ...
    def make(self, tensors: Tensors) -> np.ndarray: ...


@dataclass(frozen=True)
class WeightStep:
    """One operation on a weight: `Transpose` by a permutation, `Cast` to a dtype, `Add` or `Mul` a number."""

    op: str
    argument: tuple[int, ...] | float | ir.DataType

    def described(self) -> WeightChange:
        """The same for the manifest."""
        argument = self.argument.name if isinstance(self.argument, ir.DataType) else self.argument
        return WeightChange.model_validate({"op": self.op, "argument": argument})

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
    """A weight of a graph: tensors of the checkpoint, one below the other, as fp32, and steps after that."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType = ir.DataType.FLOAT
    steps: tuple[WeightStep, ...] = ()
    constant: np.ndarray | None = field(default=None, compare=False)  # a weight of the trace's own, no source

    @property
    def name(self) -> str:
        """The weight's name in every graph: its sources, and each step in short."""
        return ".".join([joined(self.sources), *(step.op.lower() for step in self.steps)])

    @property
    def content(self) -> str:
        return self.name

    @property
    def origin(self) -> Origin:
        sources = self.sources if self.constant is None else ()
        return Origin(sources, tuple(step.described() for step in self.steps), self.dtype.bitwidth)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.bitwidth // 8

    def then(self, step: WeightStep, shape: tuple[int, ...]) -> Recipe:
        return replace(self, shape=shape, steps=(*self.steps, step))

    def value(self, tensors: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, in `dtype` if given; in the checkpoint's dtype, and mapped, where it is one source,
        transposed at most. No more of it is in fp32 at a time than `CHUNK` numbers, or a row."""
        parts = [tensors.tensor(source) for source in self.sources]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        changes = [step for step in self.steps if step.op != "Transpose"]
        if changes or dtype not in (None, value.dtype):
            value = _changed(value, changes, dtype or torch.float32)
        for step in self.steps:
            if step.op == "Transpose":  # all else is done number by number
                value = step.run(value)
        return value

    def make(self, tensors: Tensors) -> np.ndarray:
        """The finished weight, C-contiguous."""
        if self.constant is not None:
            return self.constant
        return self.value(tensors, TORCH_DTYPES[self.dtype]).contiguous().numpy()


def _changed(source: torch.Tensor, steps: Sequence[WeightStep], dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty(source.shape, dtype=dtype)
    rows = max(1, CHUNK * len(source) // max(1, source.numel()))
    for part, place in zip(torch.split(source, rows), torch.split(made, rows), strict=True):
        value = part.to(torch.float32)
        for step in steps:
            value = step.run(value)
        place.copy_(value)
    return made


def joined(names: tuple[str, ...]) -> str:
    """One name for several: what they share of their dotted parts once, and between it the rest with `+`."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shortest = min(len(name) for name in parts)
    start = next((i for i in range(shortest) if len({name[i] for name in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({name[-1 - i] for name in parts}) > 1), 0)
    middle = "+".join(".".join(name[start : len(name) - end]) for name in parts)
    return ".".join([*parts[0][:start], middle, *parts[0][len(parts[0]) - end :]])


def take_out(model: ir.Model, names: Iterable[str]) -> list[Recipe]:
    """Replace weights, and what is computed from weights alone, by graph inputs; return their recipes.

    names: the initializers that are weights. Inputs are named by `Recipe.name`; `weights.save_graph` makes
    them initializers again, which point into the weights file.
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
            place(Recipe((name,), tuple(value.shape.numpy())), value)
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
    """The recipe of a node's output where its inputs are weights and perhaps one number, else None."""
    recipe = next((known[id(value)] for value in node.inputs if id(value) in known), None)
    if recipe is None:
        return None
    if node.op_type == "Concat":
        return _together([known.get(id(value)) for value in node.inputs], node.attributes["axis"].as_int())
    if node.op_type == "Transpose":
        permutation = tuple(node.attributes["perm"].as_ints())
        return recipe.then(
            WeightStep("Transpose", permutation), tuple(recipe.shape[axis] for axis in permutation)
        )
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
        if dtype == recipe.dtype:
            return recipe
        return replace(recipe.then(WeightStep("Cast", dtype), recipe.shape), dtype=dtype)
    if node.op_type in ("Add", "Mul"):
        numbers = [ir.convenience.get_const_tensor(value) for value in node.inputs if value is not None]
        number = next((tensor for tensor in numbers if tensor is not None and tensor.size == 1), None)
        if number is not None:
            return recipe.then(WeightStep(node.op_type, float(number.numpy().item())), recipe.shape)
    return None


def _together(recipes: list[Recipe | None], axis: int) -> Recipe | None:
    """Plain weights one below the other as one recipe; None where one is no weight or was worked on."""
    plain = [recipe for recipe in recipes if recipe is not None and not recipe.steps]
    if axis != 0 or len(plain) < len(recipes):
        return None
    sources = tuple(source for recipe in plain for source in recipe.sources)
    return Recipe(sources, (sum(recipe.shape[0] for recipe in plain), *plain[0].shape[1:]))


def take_out_constants(model: ir.Model) -> list[Recipe]:
    """Like `take_out`, for large constants of the trace itself; small ones stay in the graph."""
    recipes = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= SUBGRAPH_BYTES:
            continue
        array = np.ascontiguousarray(tensor.numpy())
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:12]
        recipe = Recipe((f"constant.{digest}",), array.shape, tensor.dtype, constant=array)
        del model.graph.initializers[name]
        value.const_value = None
        value.name = recipe.name
        model.graph.inputs.append(value)
        recipes.append(recipe)
    return recipes
