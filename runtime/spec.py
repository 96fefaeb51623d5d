"""The shape of a frozen model: its layers, and what fixes a graph's shape.

Shapes: B batch, P prompt tokens (`max_len`), C cache slots, KV key/value heads, D head size.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

LayerKind = Literal["full_attention", "sliding_attention"]
Role = Literal["prefill", "decode", "dynamic", "vision", "embed"]


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error."""

    # NaN of a failed check must survive a round trip through JSON; as null it would not be read again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LayerSpec(Frozen):
    """One decoder layer: its attention kind, and the positions it sees (None: all of them).

    kv_heads, head_dim: of its keys and values. kv_from: the earlier layer whose keys and values it reads; it
    then has none of its own, and no cache. None where it makes them itself.
    """

    kind: LayerKind
    window: PositiveInt | None = None
    kv_heads: PositiveInt
    head_dim: PositiveInt
    kv_from: NonNegativeInt | None = None

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
    max_position_embeddings: PositiveInt
    layers: tuple[LayerSpec, ...]
    vision: VisionSpec | None = None

    @model_validator(mode="after")
    def _shared_layers_fit(self) -> ModelSpec:
        for index, layer in enumerate(self.layers):
            if layer.kv_from is None:
                continue
            if layer.kv_from >= index:
                raise ValueError(
                    f"layer {index} reads keys and values of layer {layer.kv_from}, not before it"
                )
            source = self.layers[layer.kv_from]
            if source != layer.model_copy(update={"kv_from": None}):
                wanted = "which has none of its own, or is of another kind or size"
                raise ValueError(f"layer {index} reads keys and values of layer {layer.kv_from}, {wanted}")
        return self

    @property
    def windows(self) -> list[int]:
        """The different windows of the sliding layers, ascending."""
        return sorted({layer.window for layer in self.layers if layer.window is not None})

    @property
    def cached(self) -> list[int]:
        """The layers that have a cache: all but those that read another's keys and values."""
        return [index for index, layer in enumerate(self.layers) if layer.kv_from is None]


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


def cache_shape(spec: ModelSpec, shape: GraphShape, layer: int) -> tuple[int, int, int, int]:
    """[B, KV, C, D] of the key or the value buffer of a layer that has a cache."""
    own = spec.layers[layer]
    return shape.batch, own.kv_heads, shape.capacity(own), own.head_dim


def marks_pictures(spec: ModelSpec, shape: GraphShape) -> bool:
    """Whether a graph is told which tokens are of a picture, because they see each other."""
    return shape.embeds and spec.vision is not None and spec.vision.bidirectional
