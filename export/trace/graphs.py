"""The graphs as modules: prefill takes a prompt, decode one token, dynamic both; vision takes pictures.

They call the unchanged model of transformers with a `StaticCache`, positions and masks of their own; what is
traced below that is the model's code. Shapes: B batch, P prompt tokens, S tokens, C cache slots,
V vocabulary; of the dynamic graph T past tokens; of the vision graph N pictures, T features of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillgraph.errors import StillgraphError
from stillgraph.exporter.families import Family
from stillgraph.exporter.trace.attention import additive_mask
from stillgraph.exporter.trace.dynamic_cache import GrowingCache
from stillgraph.exporter.trace.fused_cache import FusedCache
from stillgraph.exporter.trace.image_cache import PictureCache
from stillgraph.exporter.trace.static_cache import StaticCache, same_picture, visible
from stillgraph.spec import GraphShape, LayerKind, LayerSpec, ModelSpec, marks_pictures


def by_kind(spec: ModelSpec) -> dict[LayerKind, LayerSpec]:
    """A layer of each kind, which stands for all of them: one mask and one RoPE table serve a kind.

    Raises StillgraphError where layers of a kind differ in more than whose keys and values they read.
    """
    found: dict[LayerKind, LayerSpec] = {}
    for index, each in enumerate(spec.layers):
        layer = each.model_copy(update={"kv_from": None})
        if found.setdefault(layer.kind, layer) != layer:
            problem = f"layer {index} differs from other {layer.kind} layers in its window or its heads"
            raise StillgraphError("trace", problem, "export a checkpoint whose layers of a kind are alike")
    return found


def groups(spec: ModelSpec, layer: LayerSpec) -> int:
    """Query heads that share a key/value head."""
    return spec.num_attention_heads // layer.kv_heads


def masks(
    spec: ModelSpec, positions: Tensor, count: int, pictures: Tensor | None = None
) -> dict[str, Tensor]:
    """The additive mask of each layer kind, for queries at `positions` [B, S] over `count` keys.

    pictures: `same_picture`'s, of the tokens at these positions.
    """
    same = None
    if pictures is not None:
        same = same_picture(pictures, torch.arange(count)[None] - positions[:, :1])
    return {
        kind: additive_mask(visible(positions, count, layer.window, same), groups(spec, layer))
        for kind, layer in by_kind(spec).items()
    }


def by_layer(spec: ModelSpec, tensors: tuple[Tensor, ...]) -> dict[int, tuple[Tensor, Tensor]]:
    """(key, value) of each layer that has a cache, of the tensors in the order of the ports."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return dict(zip(spec.cached, pairs, strict=True))


class Graph(nn.Module):
    """A causal language model as a function of tensors of fixed shapes."""

    def __init__(self, model: Any, family: Family, spec: ModelSpec, shape: GraphShape) -> None:
        super().__init__()
        self.model: Any = model  # of transformers, which is not typed
        self.family, self.spec, self.shape = family, spec, shape
        self.rotary = {} if shape.slack is None else rotary_tables(model, family, spec, shape)

    @property
    def decoder(self) -> Any:
        """A property: registering it as a submodule would rename its parameters."""
        return self.family.decoder(self.model)

    def step(
        self,
        tokens: Tensor,
        past_length: Tensor | None,
        new_length: Tensor | None,
        past: tuple[Tensor, ...],
        pictures: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the decoder over ids [B, S] or embeddings [B, S, hidden].

        pictures: int64 [B, S], numbers of pictures whose tokens see each other, 0 for text. Returns (logits
        [B, 1, V], key, value of the first layer with a cache, key, ...).
        """
        positions = torch.arange(tokens.shape[1])[None, :].expand(tokens.shape[0], -1)
        if past_length is not None:
            positions = positions + past_length[:, None]
        attention_masks: dict[str, Tensor | None]
        buffers = by_layer(self.spec, past) if past else None
        cache: StaticCache | FusedCache | PictureCache
        if self.shape.slack is not None:
            assert past_length is not None
            assert buffers is not None
            valid = torch.ones_like(past_length) if new_length is None else new_length
            cache = FusedCache(self.spec, self.shape, buffers, (past_length, valid), self.rotary)
            if pictures is not None:
                cache = PictureCache(cache, pictures)
            attention_masks = dict.fromkeys((layer.kind for layer in self.spec.layers), None)
        else:
            cache = StaticCache(buffers, past_length, new_length)
            attention_masks = {**masks(self.spec, positions, self.shape.limit, pictures)}
        hidden = self.decoder(
            **{"inputs_embeds" if self.shape.embeds else "input_ids": tokens},
            attention_mask=self.family.masks(self.model.config, attention_masks),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [B, S, hidden]
        logits = self.head(hidden if new_length is None else last_valid(hidden, new_length))
        present = [cache.present[layer] for layer in self.spec.cached]
        return logits, *(tensor for pair in present for tensor in pair)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, 1, V] of hidden states [B, 1, hidden]."""
        return self.family.logits(self.model.config.get_text_config(), self.model.lm_head(hidden))


def rotary_tables(
    model: Any, family: Family, spec: ModelSpec, shape: GraphShape
) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin [R, D / 2] of each layer kind for every position and a padded chunk behind the last.

    They are what the model's own rotary embedding gives; both halves of its [R, D] are the same. D is less
    than a head where only the first part of it is rotated.
    """
    positions = torch.arange(shape.limit + (shape.slack or 0))[None]
    tables: dict[str, tuple[Tensor, Tensor]] = {}
    for kind in sorted(by_kind(spec)):
        cos, sin = family.rotary(family.decoder(model).rotary_emb, positions, kind)
        half = cos.shape[-1] // 2
        tables[kind] = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
    return tables


def last_valid(hidden: Tensor, length: Tensor) -> Tensor:
    """The hidden state of each row's last valid token: [B, S, hidden] and int64 [B] to [B, 1, hidden]."""
    rows = [
        hidden[row : row + 1].index_select(1, length[row : row + 1] - 1) for row in range(hidden.shape[0])
    ]
    return torch.cat(rows)


class PrefillGraph(Graph):
    """`max_len` right-padded tokens, from nothing or continuing a cache of `ctx` slots."""

    def forward(self, tokens: Tensor, prompt_length: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """rest: numbers of pictures where the model wants them, past_length and past where there is a ctx."""
        pictures, cache = (rest[0], rest[1:]) if marks_pictures(self.spec, self.shape) else (None, rest)
        past_length, past = (cache[0], cache[1:]) if cache else (None, ())
        return self.step(tokens, past_length, prompt_length, past, pictures)


class DecodeGraph(Graph):
    """One token a row, over a cache of `ctx` slots."""

    def forward(self, input_ids: Tensor, past_length: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        return self.step(input_ids, past_length, None, past)


class DynamicGraph(Graph):
    """Any number of tokens, behind keys and values of any length: both are symbols in the graph."""

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """input_ids [B, S], past [B, KV, T, D]: (logits [B, 1, V], keys [B, KV, T + S, D], ...)."""
        cache = GrowingCache(by_layer(self.spec, past))
        length, new = cache.get_seq_length(), input_ids.shape[1]
        positions = torch.arange(length, length + new)[None]
        hidden = self.decoder(
            input_ids=input_ids,
            attention_mask=self.family.masks(self.model.config, masks(self.spec, positions, length + new)),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [B, S, hidden]
        present = [cache.present[layer] for layer in self.spec.cached]
        return self.head(hidden[:, -1:]), *(tensor for pair in present for tensor in pair)


class EmbedGraph(Graph):
    """Ids [B, P] to embeddings [B, P, hidden], as the decoder makes them."""

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.decoder.embed_tokens(input_ids)
        return embeddings


class VisionGraph(Graph):
    """Pictures [N, 3, H, W] to features [N, T, hidden]: tower and projector."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert self.family.features is not None
        return self.family.features(self.model, pixel_values)


GRAPHS: dict[str, type[Graph]] = {
    "prefill": PrefillGraph,
    "decode": DecodeGraph,
    "dynamic": DynamicGraph,
    "embed": EmbedGraph,
    "vision": VisionGraph,
}
