"""Attention over the onnxruntime target's cache where the tokens of a picture see each other.

GroupQueryAttention looks back alone. Here it only writes the cache, as the decode graph will read it, and
primitive ops attend over what that cache held before and the new tokens.
Shapes: B batch, S new tokens, H query heads, KV key/value heads, C cache slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillgraph.exporter.trace.attention import additive_mask, portable_attention
from stillgraph.exporter.trace.fused_cache import FusedCache
from stillgraph.exporter.trace.static_cache import same_picture, visible
from stillgraph.spec import LayerSpec

NOWHERE = 2**30  # the position of a slot that holds nothing: behind every query


class PictureCache:
    """What a model calls `past_key_values`, around the FusedCache that is written.

    pictures: int64 [B, S], numbers of the new tokens' pictures, 0 for text.
    """

    def __init__(self, cache: FusedCache, pictures: Tensor) -> None:
        self.cache, self.present = cache, cache.present
        self.masks = {layer.kind: self._mask(layer, pictures) for layer in cache.spec.layers}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        module: nn.Module,
        softcap: float | None = None,
        rope: bool = True,
    ) -> Tensor:
        """As `FusedCache.attend`: [B, S, H * D]."""
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = self.cache.spec.layers[index]
        if rope:
            query, key = (self.cache.rotate(heads, layer) for heads in (query, key))
        pairs = zip(self.cache.past[index], (key, value), strict=True)
        keys, values = (torch.cat([past, _heads(new, layer)], dim=2) for past, new in pairs)
        scaling = float(module.scaling)  # type: ignore[arg-type]
        mask = self.masks[layer.kind]
        seen, _ = portable_attention(module, _heads(query, layer), keys, values, mask, scaling, softcap)
        output = seen.reshape(query.shape)
        # The op writes into the buffers that were just read. It has to come later, so it is given a query
        # that there is only then; what it makes of it is not used, so few heads will do.
        self.cache.call(module, output[:, :, : key.shape[-1]], key, value, rotates=False)
        return output

    def _mask(self, layer: LayerSpec, pictures: Tensor) -> Tensor:
        """Of the queries over the slots of the cache before the call and, behind them, the new tokens."""
        cache = self.cache
        length, capacity = cache.past_length[:, None], cache.shape.capacity(layer)
        held = torch.arange(capacity)[None] + self._first_position(layer)
        new = length + torch.arange(pictures.shape[1])[None]
        keys = torch.cat([torch.where(held < length, held, NOWHERE), new], dim=1)
        source = torch.arange(-capacity, pictures.shape[1])[None].expand(pictures.shape[0], -1)
        seen = visible(new, keys, layer.window, same_picture(pictures, source))
        return additive_mask(seen, cache.spec.num_attention_heads // layer.kv_heads)

    def _first_position(self, layer: LayerSpec) -> Tensor:
        """`GraphShape.first_position` of each row's cache before the call: int64 [B, 1]."""
        shape, length = self.cache.shape, self.cache.past_length[:, None]
        if not shape.evicts(layer):
            return torch.zeros_like(length)
        assert layer.window is not None
        capacity = shape.capacity(layer)
        stride = capacity - layer.window + 1
        moved = torch.div((length - capacity + stride - 1).clamp(min=0), stride, rounding_mode="trunc")
        return moved * stride

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As `FusedCache.get_seq_length`."""
        return self.cache.get_seq_length(layer_idx)


def _heads(tensor: Tensor, layer: LayerSpec) -> Tensor:
    """[B, S, heads * D] as [B, heads, S, D]."""
    batch, tokens, _ = tensor.shape
    return tensor.reshape(batch, tokens, -1, layer.head_dim).transpose(1, 2)
