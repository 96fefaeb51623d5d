"""The inputs and outputs of each graph: the one source of tensor names, roles, shapes and byte counts.

Shapes: B batch, P prompt tokens (`max_len`), C cache slots, KV key/value heads, D head size, V vocabulary; N
images, T features of one, H height, W width. A graph of role `dynamic` has lengths in their place, which have
names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Literal, get_args

from pydantic import NonNegativeInt, PositiveInt, StringConstraints, model_validator

from stillgraph.spec import Frozen, GraphShape, ModelSpec, cache_shape, marks_pictures

DType = Literal["int64", "float32", "float16"]
CacheRole = Literal["key", "value"]
PortRole = (
    CacheRole
    | Literal[
        "token_ids",
        "valid_length",
        "past_length",
        "logits",
        "pixels",
        "picture_numbers",
        "embeddings",
        "image_features",
    ]
)
LengthName = Annotated[str, StringConstraints(pattern="^[a-z_]+$")]
ITEM_SIZE: dict[str, int] = {"int64": 8, "float32": 4, "float16": 2}
NEW, PAST, TOTAL = (
    "new_tokens",
    "past_tokens",
    "total_tokens",
)  # lengths of a dynamic graph; the last is their sum


class Port(Frozen):
    """One input or output of a graph. A name in the shape is a length that every call may choose.

    role: what it is, for programs; layer: of a key or value. meaning: the same in words.
    """

    name: str
    role: PortRole
    layer: NonNegativeInt | None = None
    dtype: DType
    shape: tuple[PositiveInt | LengthName, ...]
    meaning: str

    @model_validator(mode="after")
    def _layer_fits_role(self) -> Port:
        if self.is_cache != (self.layer is not None):
            raise ValueError(f"a port of role {self.role} with layer {self.layer}")
        return self

    @property
    def is_cache(self) -> bool:
        """Whether it is the key or the value of a layer."""
        return self.role in get_args(CacheRole)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a port whose every dimension is a number."""
        return self.at({})

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * ITEM_SIZE[self.dtype]

    def at(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with `lengths` for names. Raises KeyError for a name that is not among them."""
        return tuple(lengths[size] if isinstance(size, str) else size for size in self.shape)


def of_role(ports: Iterable[Port], role: PortRole) -> Port:
    """The one port of a role that no layer has its own of. Raises KeyError where there is none."""
    for port in ports:
        if port.role == role:
            return port
    raise KeyError(role)


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def input_ports(spec: ModelSpec, shape: GraphShape) -> tuple[Port, ...]:
    """The inputs of a graph, in order."""
    if shape.role == "vision":
        return (_pixels(spec, shape),)
    if shape.grows:
        return (
            _ids((1, NEW), "token ids, at least 1"),
            *_cache_ports(spec, shape, past_names, "before the call", PAST),
        )
    sizes, rows = (shape.batch, shape.max_len), (shape.batch,)
    ports = [_ids(sizes, "token ids" if shape.role == "decode" else "token ids, right-padded")]
    if shape.embeds:
        ports = [_embeddings(spec, shape)]
    if shape.role == "prefill":
        meaning = "valid tokens of this call, at least 1"
        ports.append(
            Port(name="prompt_length", role="valid_length", dtype="int64", shape=rows, meaning=meaning)
        )
    if marks_pictures(spec, shape):
        meaning = "k for tokens of the k-th image of the call, which see each other; 0 for text"
        ports.append(
            Port(name="token_type_ids", role="picture_numbers", dtype="int64", shape=sizes, meaning=meaning)
        )
    if shape.ctx is not None:
        meaning = "tokens already in the cache"
        ports.append(Port(name="past_length", role="past_length", dtype="int64", shape=rows, meaning=meaning))
        when = "before the call; slots that hold no token are not read"
        ports += _cache_ports(spec, shape, past_names, when)
    return tuple(ports)


def output_ports(spec: ModelSpec, shape: GraphShape) -> tuple[Port, ...]:
    """The outputs of a graph, in order."""
    if shape.role == "embed":
        return (_embeddings(spec, shape),)
    if shape.role == "vision":
        sizes = shape.batch, shape.max_len, spec.hidden_size
        meaning = "what a prompt has for an image's tokens in place of embeddings"
        name = "image_features"
        return (Port(name=name, role="image_features", dtype="float32", shape=sizes, meaning=meaning),)
    meaning = "next-token logits after the last valid token of each row"
    sizes = shape.batch, 1, spec.vocab_size
    logits = Port(name="logits", role="logits", dtype="float32", shape=sizes, meaning=meaning)
    total = TOTAL if shape.grows else None
    return (logits, *_cache_ports(spec, shape, present_names, "after the call", total))


def _ids(sizes: tuple[int | str, ...], meaning: str) -> Port:
    return Port(name="input_ids", role="token_ids", dtype="int64", shape=sizes, meaning=meaning)


def _pixels(spec: ModelSpec, shape: GraphShape) -> Port:
    assert spec.vision is not None
    sizes = shape.batch, spec.vision.channels, spec.vision.height, spec.vision.width
    meaning = "pixels, as preprocessed"
    return Port(name="pixel_values", role="pixels", dtype="float32", shape=sizes, meaning=meaning)


def _embeddings(spec: ModelSpec, shape: GraphShape) -> Port:
    sizes = shape.batch, shape.max_len, spec.hidden_size
    meaning = "embeddings of tokens, or features of images in their place; right-padded"
    return Port(name="inputs_embeds", role="embeddings", dtype="float32", shape=sizes, meaning=meaning)


def _cache_ports(
    spec: ModelSpec,
    shape: GraphShape,
    names: Callable[[int], tuple[str, str]],
    when: str,
    length: str | None = None,
) -> list[Port]:
    """length: the name of the keys' and values' length, where they have one instead of slots."""
    ports = []
    for layer in spec.cached:
        batch, heads, capacity, size = cache_shape(spec, shape, layer)
        for role, name in zip(get_args(CacheRole), names(layer), strict=True):
            sizes, meaning = (batch, heads, length or capacity, size), f"layer {layer} {role}s {when}"
            ports.append(
                Port(name=name, role=role, layer=layer, dtype="float32", shape=sizes, meaning=meaning)
            )
    return ports
