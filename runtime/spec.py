"""The shape of a frozen model: the one source of tensor names, shapes and byte counts.

Shapes: B batch, P prompt tokens (`max_len`), C cache slots, KV key/value heads, D head size, V vocabulary; N
images, T features of one, H height, W width.
A graph of role `dynamic` has lengths in their place, which have names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, model_validator

LayerKind = Literal["full_attention", "sliding_attention"]
DType = Literal["int64", "float32", "float16"]
Role = Literal["prefill", "decode", "dynamic", "vision", "embed"]
LengthName = Annotated[str, StringConstraints(pattern="^[a-z_]+$")]
ITEM_SIZE: dict[str, int] = {"int64": 8, "float32": 4, "float16": 2}
NEW, PAST, TOTAL = (
    "new_tokens",
    "past_tokens",
    "total_tokens",
)  # lengths of a dynamic graph; the last is their sum


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error."""

    # NaN of a failed check must survive a round trip through JSON; as null it would not be read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerSpec(Frozen):
    """One decoder layer: its attention kind, and the positions it sees (None: all of them)."""

    kind: LayerKind
    window: PositiveInt | None = None

    @model_validator(mode="after")
    def _window_fits_kind(self) -> LayerSpec:
        if (self.kind == "sliding_attention") != (self.window is not None):
            raise ValueError(f"a {self.kind} layer with window {self.window}")
        return self


class VisionSpec(Frozen):
    """What a decoder is given of a picture: `image_tokens` features, each in place of a prompt's token.

    image_token: the id of those tokens; bidirectional: whether a picture's tokens see each other
    in both directions, so that it comes whole in one call of the prefill; mark: what stands for a picture in
    a prompt's text, and `before`, `after` what the text has around its image tokens instead.
    """

    channels: PositiveInt
    height: PositiveInt
    width: PositiveInt
    image_tokens: PositiveInt
    image_token: NonNegativeInt
    mark: str
    bidirectional: bool = False
    before: str = ""
    after: str = ""


class ModelSpec(Frozen):
    """What the graphs need to know of a decoder, and of the pictures that it takes."""

    architecture: str
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    layers: tuple[LayerSpec, ...]
    vision: VisionSpec | None = None

    @property
    def windows(self) -> list[int]:
        """The different windows of the sliding layers, ascending."""
        return sorted({layer.window for layer in self.layers if layer.window is not None})


class Port(Frozen):
    """One input or output of a graph. A name in the shape is a length that every call may choose."""

    name: str
    dtype: DType
    shape: tuple[PositiveInt | LengthName, ...]
    meaning: str

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


class GraphShape(Frozen):
    """What fixes a graph's shape: its role, rows, tokens per call and cache slots.

    max_len: the most tokens of a call, P for a prefill and 1 for a decode. ctx: tokens that the cache can
    hold; None for a prefill that starts from nothing. A dynamic graph, whose keys and values grow with the
    text, takes any number of tokens: its max_len and ctx only say where a runtime stops. slack: None where
    every layer has ctx slots (the portable target). In the onnxruntime target, slots over what a layer must
    keep: full layers have ctx + slack, so that a padded chunk always fits behind the last token, and sliding
    layers window + slack, so that old tokens are moved out once in slack + 1 tokens and not at each one.
    embeds: whether a prefill takes embeddings, which an embed graph makes of ids. The max_len of a vision
    graph is the number of features of a picture; it has one picture a row. int8_activations: whether the
    products of a prefill round each token's activations to int8, with one scale a token.
    """

    role: Role
    batch: PositiveInt = 1
    max_len: PositiveInt
    ctx: PositiveInt | None = None
    slack: NonNegativeInt | None = None
    embeds: bool = False
    int8_activations: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> GraphShape:
        if self.role == "decode" and (self.max_len != 1 or self.ctx is None):
            raise ValueError("a decode graph takes one token and has a ctx")
        if self.grows and (self.batch, self.max_len, self.slack) != (1, self.ctx, None):
            raise ValueError("a dynamic graph has one row, a max_len of ctx, and no slack")
        if self.embeds and self.role != "prefill":
            raise ValueError(f"a {self.role} graph that takes embeddings")
        if self.int8_activations and self.role != "prefill":
            raise ValueError(f"a {self.role} graph of int8 activations")
        if not self.caches and (self.ctx, self.slack) != (None, None):
            raise ValueError(f"a {self.role} graph has no cache")
        if self.slack is not None and (self.ctx is None or self.slack < self.max_len - 1):
            raise ValueError("a graph with slack has a ctx, and slack for a padded chunk")
        return self

    @property
    def name(self) -> str:
        """File name without suffix: `prefill-128`, `prefill-128-int8`, `decode-1024`, `dynamic`, `vision`."""
        if self.role in ("dynamic", "vision"):
            return self.role
        products = "-int8" if self.int8_activations else ""
        return f"{self.role}-{self.ctx if self.role == 'decode' else self.max_len}{products}"

    @property
    def grows(self) -> bool:
        """Whether keys and values are as long as the text, and not as the cache."""
        return self.role == "dynamic"

    @property
    def caches(self) -> bool:
        """Whether the graph makes keys and values."""
        return self.role not in ("vision", "embed")

    @property
    def limit(self) -> int:
        """Tokens that the keys and values can hold: ctx, or P where there is no cache to continue."""
        return self.ctx or self.max_len

    def capacity(self, layer: LayerSpec) -> int:
        """Slots of a layer's key and value buffers."""
        full = self.limit + (self.slack or 0)
        return full if self.slack is None or layer.window is None else min(full, layer.window + self.slack)

    def evicts(self, layer: LayerSpec) -> bool:
        """Whether a layer's buffers have no slot of their own for every position, so that old ones leave."""
        return self.capacity(layer) < self.limit + (self.slack or 0)

    def first_position(self, layer: LayerSpec, length: int) -> int:
        """The position in slot 0 of a layer's buffers that have taken `length` tokens.

        0 until they are full. Then GroupQueryAttention with `sliding_window_cache` moves the last window - 1
        tokens to the front and goes on behind them, so it depends on the length alone, not on the chunks.
        """
        capacity = self.capacity(layer)
        if length <= capacity or not self.evicts(layer):
            return 0
        assert layer.window is not None
        stride = capacity - layer.window + 1
        return -(-(length - capacity) // stride) * stride


def past_names(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def cache_shape(spec: ModelSpec, shape: GraphShape, layer: int) -> tuple[int, int, int, int]:
    """[B, KV, C, D] of a layer's key or value buffer."""
    return shape.batch, spec.num_key_value_heads, shape.capacity(spec.layers[layer]), spec.head_dim


def marks_pictures(spec: ModelSpec, shape: GraphShape) -> bool:
    """Whether a graph is told which tokens are of a picture, because they see each other."""
    return shape.embeds and spec.vision is not None and spec.vision.bidirectional


def input_ports(spec: ModelSpec, shape: GraphShape) -> tuple[Port, ...]:
    """The inputs of a graph, in order."""
    if shape.role == "vision":
        return (_pixels(spec, shape),)
    if shape.grows:
        ids = Port(name="input_ids", dtype="int64", shape=(1, NEW), meaning="token ids, at least 1")
        return (ids, *_cache_ports(spec, shape, past_names, "before the call", PAST))
    rows = (shape.batch,)
    meaning = "token ids" if shape.role == "decode" else "token ids, right-padded"
    ports = [Port(name="input_ids", dtype="int64", shape=(shape.batch, shape.max_len), meaning=meaning)]
    if shape.embeds:
        ports = [_embeddings(spec, shape)]
    if shape.role == "prefill":
        meaning = "valid tokens of this call, at least 1"
        ports.append(Port(name="prompt_length", dtype="int64", shape=rows, meaning=meaning))
    if marks_pictures(spec, shape):
        meaning = "k for tokens of the k-th image of the call, which see each other; 0 for text"
        sizes = shape.batch, shape.max_len
        ports.append(Port(name="token_type_ids", dtype="int64", shape=sizes, meaning=meaning))
    if shape.ctx is not None:
        ports.append(
            Port(name="past_length", dtype="int64", shape=rows, meaning="tokens already in the cache")
        )
        ports += _cache_ports(
            spec, shape, past_names, "before the call; slots from past_length on are not read"
        )
    return tuple(ports)


def output_ports(spec: ModelSpec, shape: GraphShape) -> tuple[Port, ...]:
    """The outputs of a graph, in order."""
    if shape.role == "embed":
        return (_embeddings(spec, shape),)
    if shape.role == "vision":
        sizes = shape.batch, shape.max_len, spec.hidden_size
        features = "what a prompt has for an image's tokens in place of embeddings"
        return (Port(name="image_features", dtype="float32", shape=sizes, meaning=features),)
    meaning = "next-token logits after the last valid token of each row"
    logits = Port(name="logits", dtype="float32", shape=(shape.batch, 1, spec.vocab_size), meaning=meaning)
    total = TOTAL if shape.grows else None
    return (logits, *_cache_ports(spec, shape, present_names, "after the call", total))


def _pixels(spec: ModelSpec, shape: GraphShape) -> Port:
    assert spec.vision is not None
    sizes = shape.batch, spec.vision.channels, spec.vision.height, spec.vision.width
    return Port(name="pixel_values", dtype="float32", shape=sizes, meaning="pixels, as preprocessed")


def _embeddings(spec: ModelSpec, shape: GraphShape) -> Port:
    sizes = shape.batch, shape.max_len, spec.hidden_size
    meaning = "embeddings of tokens, or features of images in their place; right-padded"
    return Port(name="inputs_embeds", dtype="float32", shape=sizes, meaning=meaning)


def _cache_ports(
    spec: ModelSpec,
    shape: GraphShape,
    names: Callable[[int], tuple[str, str]],
    when: str,
    length: str | None = None,
) -> list[Port]:
    """length: the name of the keys' and values' length, where they have one instead of slots."""
    ports = []
    for i in range(len(spec.layers)):
        batch, heads, capacity, size = cache_shape(spec, shape, i)
        for kind, name in zip(("keys", "values"), names(i), strict=True):
            sizes, meaning = (batch, heads, length or capacity, size), f"layer {i} {kind} {when}"
            ports.append(Port(name=name, dtype="float32", shape=sizes, meaning=meaning))
    return ports
