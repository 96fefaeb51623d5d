"""The key/value cache of the onnxruntime target: one op writes it, reads it and moves the window on.

Shapes: B batch, S new tokens, H query heads, KV key/value heads, C cache slots, D head size,
R positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stillgraph.spec import GraphShape, LayerSpec, ModelSpec

GROUP_QUERY_ATTENTION = "com.microsoft::GroupQueryAttention"
ROTARY_MULTIPLE = 16  # of the RoPE inside the op; other heads are rotated before it
UNUSED = [None] * 7  # position_ids to v_norm_weight, between sin_cache and query_seqlens


class FusedCache:
    """What a model calls `past_key_values`, and the attention over it, since one op does both in place.

    past: (key, value) [B, KV, C, D] by layer; past_length: int64 [B] tokens in the cache before this call;
    new_length: int64 [B] valid ones of the S new tokens; rotary: (cos, sin) [R, D / 2] of each layer kind, or
    less where only the first part of a head is rotated.
    `present[i]` holds layer i's (key, value) after its `attend`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shape: GraphShape,
        past: Mapping[int, tuple[Tensor, Tensor]],
        lengths: tuple[Tensor, Tensor],
        rotary: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        self.spec, self.shape, self.past, self.rotary = spec, shape, past, rotary
        past_length, new_length = lengths
        self.past_length, self.new_length = past_length, new_length.to(torch.int32)
        self.last = (past_length + new_length - 1).to(torch.int32)  # what the op calls seqlens_k
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        module: nn.Module,
        softcap: float | None = None,
        rope: bool = True,
    ) -> Tensor:
        """Attention of layer `module.layer_idx` over its past and the new tokens: [B, S, H * D].

        query: [B, S, H * D], key and value: [B, S, KV * D], normalized, RoPE not yet applied; softcap: the
        cap of the scores; rope: whether the layer has RoPE.
        """
        layer = self.spec.layers[module.layer_idx]  # type: ignore[index]
        before = self.rotates_before(layer)
        if rope and before:
            query, key = (self.rotate(heads, layer) for heads in (query, key))
        return self.call(module, query, key, value, rope and not before, softcap)

    def call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotates: bool,
        softcap: float | None = None,
    ) -> Tensor:
        """The op itself, which writes the cache: [B, S, heads * D] of any number of query heads.

        rotates: whether it applies RoPE.
        """
        index: int = module.layer_idx  # type: ignore[assignment]
        layer, scaling = self.spec.layers[index], module.scaling
        past_key, past_value = self.past[index]
        # Without sliding_window_cache the op wants all positions to fit, and takes this as their number.
        total = torch.tensor(self.shape.limit + (self.shape.slack or 0), dtype=torch.int32)
        inputs: list[Tensor | None] = [query, key, value, past_key, past_value, self.last, total]
        inputs += self.rotary[layer.kind] if rotates else [None, None]
        output, *present = torch.onnx.ops.symbolic_multi_out(
            GROUP_QUERY_ATTENTION,
            [*inputs, *UNUSED, self.new_length],
            attrs={  # RoPE rotates halves (`rotate_half` of transformers): not interleaved
                "num_heads": query.shape[-1] // layer.head_dim,
                "kv_num_heads": layer.kv_heads,
                "scale": float(scaling),  # type: ignore[arg-type]
                "do_rotary": int(rotates),
                "rotary_interleaved": 0,
                "local_window_size": layer.window or -1,
                "sliding_window_cache": int(self.shape.evicts(layer)),
                **({} if softcap is None else {"softcap": float(softcap)}),
            },
            dtypes=[query.dtype] * 3,
            shapes=[query.shape, past_key.shape, past_value.shape],
            version=1,
        )
        self.present[index] = present[0], present[1]
        return output

    def rotated(self, layer: LayerSpec) -> int:
        """Elements of a layer's heads that RoPE rotates, the first ones: [R, rotated / 2] are its tables."""
        return 2 * self.rotary[layer.kind][0].shape[-1]

    def rotates_before(self, layer: LayerSpec) -> bool:
        """Whether RoPE comes before the op, which rotates only whole heads of some sizes."""
        return layer.head_dim % ROTARY_MULTIPLE != 0 or self.rotated(layer) != layer.head_dim

    def rotate(self, heads: Tensor, layer: LayerSpec) -> Tensor:
        """RoPE of a layer's [B, S, heads * D] at the positions of this call."""
        cos, sin = self.rotary[layer.kind]
        offsets = torch.arange(heads.shape[1])[None, :]
        rotated: Tensor = torch.onnx.ops.symbolic(
            "RotaryEmbedding",
            [heads, cos, sin, self.past_length[:, None] + offsets],
            attrs={
                "num_heads": heads.shape[-1] // layer.head_dim,
                "rotary_embedding_dim": 0 if self.rotated(layer) == layer.head_dim else self.rotated(layer),
            },
            dtype=heads.dtype,
            shape=heads.shape,
            version=23,
        )
        return rotated

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Asked for by models that make their own positions; ours are in the op."""
        return 0
