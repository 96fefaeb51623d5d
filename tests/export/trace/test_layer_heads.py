"""Layers with key/value heads of their own number and size, and layers without any, while graphs are traced.

Shapes: B rows, S new tokens, C cache slots, H query heads, KV key/value heads, D head size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from stillgraph.errors import StillgraphError
from stillgraph.exporter.config import check_heads
from stillgraph.exporter.ort import session_options
from stillgraph.exporter.trace.fused_cache import FusedCache
from stillgraph.exporter.trace.graphs import by_kind, by_layer, masks, rotary_tables
from stillgraph.exporter.trace.static_cache import StaticCache
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec, cache_shape

H, CTX = 4, 24
FULL = LayerSpec(kind="full_attention", kv_heads=1, head_dim=32)
SLIDING = LayerSpec(kind="sliding_attention", window=5, kv_heads=2, head_dim=16)
SHAPE = GraphShape(role="prefill", max_len=6, ctx=CTX, slack=6)


def spec_of(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec(
        architecture="Mixed", vocab_size=8, hidden_size=8, num_attention_heads=H,
        max_position_embeddings=64, layers=layers,
    )  # fmt: skip


def shared(layer: LayerSpec, kv_from: int) -> LayerSpec:
    return layer.model_copy(update={"kv_from": kv_from})


def test_masks_repeat_for_the_query_heads_of_each_kind() -> None:
    made = masks(spec_of(SLIDING, FULL), torch.arange(6)[None], CTX)
    assert {kind: mask.shape for kind, mask in made.items()} == {
        "full_attention": (1, 1, 4 * 6, CTX),
        "sliding_attention": (1, 1, 2 * 6, CTX),
    }


def test_rotary_tables_are_as_wide_as_the_heads_of_each_kind() -> None:
    def rotary(module: Any, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        width = {"full_attention": 32, "sliding_attention": 16}[kind]
        return (torch.ones(*positions.shape, width),) * 2

    family: Any = SimpleNamespace(rotary=rotary, decoder=lambda model: SimpleNamespace(rotary_emb=None))
    tables = rotary_tables(None, family, spec_of(SLIDING, FULL), SHAPE)
    assert {kind: cos.shape for kind, (cos, _) in tables.items()} == {
        "full_attention": (CTX + 6, 16),
        "sliding_attention": (CTX + 6, 8),
    }


def test_layers_of_a_kind_that_differ_are_refused(refused) -> None:
    assert list(by_kind(spec_of(SLIDING, FULL, shared(SLIDING, 0)))) == [
        "sliding_attention",
        "full_attention",
    ]
    for change in ({"head_dim": 8}, {"kv_heads": 1}, {"window": 4}):
        with refused("trace", "layer 2 differs from other sliding_attention layers"):
            by_kind(spec_of(SLIDING, FULL, SLIDING.model_copy(update=change)))


def test_a_layer_that_shares_is_refused_by_name_where_the_op_cannot(refused) -> None:
    spec = spec_of(SLIDING, FULL, shared(FULL, 1))
    check_heads(spec, "portable")
    with refused("export", "layer 2 reads keys and values of layer 1", "--target portable"):
        check_heads(spec, "onnxruntime")
    with pytest.raises(StillgraphError, match="a head size of 12"):
        check_heads(spec_of(FULL, SLIDING.model_copy(update={"head_dim": 12})), "onnxruntime")


def test_buffers_go_to_the_layers_that_have_some() -> None:
    spec = spec_of(SLIDING, shared(SLIDING, 0), FULL)
    shape = GraphShape(role="decode", max_len=1, ctx=CTX)
    past = tuple(torch.zeros(cache_shape(spec, shape, layer)) for layer in spec.cached for _ in range(2))
    cache = StaticCache(by_layer(spec, past), torch.tensor([3]))
    for layer in spec.cached:
        heads = spec.layers[layer]
        cache.update(*(torch.ones(1, heads.kv_heads, 1, heads.head_dim) for _ in range(2)), layer)
    assert sorted(cache.present) == [0, 2]
    assert cache.present[0][0].shape == (1, 2, CTX, 16)
    assert cache.present[2][1].shape == (1, 1, CTX, 32)
    assert [int(t.sum()) for pair in cache.present.values() for t in pair] == [32, 32, 32, 32]


class Layers(nn.Module):
    """Each layer's attention over its own part of x, [1, S, all q, k, v], through the fused cache."""

    def __init__(self, spec: ModelSpec, rotary: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.spec, self.rotary = spec, rotary

    def forward(self, x: Tensor, new: Tensor, past_length: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = FusedCache(self.spec, SHAPE, by_layer(self.spec, past), (past_length, new), self.rotary)
        parts, outputs = iter(torch.split(x, widths(self.spec), dim=-1)), []
        for index, layer in enumerate(self.spec.layers):
            module: Any = SimpleNamespace(layer_idx=index, scaling=layer.head_dim**-0.5)
            outputs.append(cache.attend(next(parts), next(parts), next(parts), module))
        present = [tensor for layer in self.spec.cached for tensor in cache.present[layer]]
        return *outputs, *present


def widths(spec: ModelSpec) -> list[int]:
    return [heads * each.head_dim for each in spec.layers for heads in (H, each.kv_heads, each.kv_heads)]


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [heads, S, D] by halves, as `rotate_half` of transformers."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(part: Tensor, layer: LayerSpec, table: tuple[Tensor, Tensor]) -> Tensor:
    """Plain attention of q, k, v [N, widths] over all N positions at once: [N, H * D]."""
    count, size = len(part), layer.head_dim
    sizes = [H * size, layer.kv_heads * size, layer.kv_heads * size]
    query, key, value = (t.view(count, -1, size).transpose(0, 1) for t in torch.split(part, sizes, dim=-1))
    query, key = (turned(heads, *(t[:count] for t in table)) for heads in (query, key))
    key, value = (t.repeat_interleave(H // layer.kv_heads, 0) for t in (key, value))
    distance = torch.arange(count)[:, None] - torch.arange(count)
    seen = (distance >= 0) & (distance < (layer.window or count))
    scores = (query @ key.transpose(1, 2) * size**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).reshape(count, -1)


def test_the_fused_cache_gives_each_layer_its_own_heads() -> None:
    """Three chunks, the last padded, past the window's first move, against attention over all at once."""
    spec = spec_of(SLIDING, FULL, SLIDING.model_copy(update={"head_dim": 16}))
    torch.manual_seed(0)
    angles = torch.arange(CTX + 6)[:, None]
    rotary = {
        layer.kind: ((a := angles / 10 ** torch.linspace(0, 3, layer.head_dim // 2)).cos(), a.sin())
        for layer in (SLIDING, FULL)
    }
    text = torch.randn(17, sum(widths(spec)))
    past = [torch.zeros(cache_shape(spec, SHAPE, layer)) for layer in spec.cached for _ in range(2)]
    example = (text[None, :6], torch.tensor([6]), torch.tensor([3]), *past)
    program = torch.onnx.export(
        Layers(spec, rotary).eval(), example, dynamo=True, opset_version=23, optimize=False
    )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), session_options())
    names = [port.name for port in session.get_inputs()]
    buffers = [ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in past]
    outputs = [np.zeros((1, 6, H * layer.head_dim), np.float32) for layer in spec.layers]
    expected = [
        attention(part, layer, rotary[layer.kind])
        for part, layer in zip(
            torch.split(text, [sum(widths(spec)[i : i + 3]) for i in (0, 3, 6)], -1), spec.layers, strict=True
        )
    ]
    for start in (0, 6, 12):
        count = min(6, 17 - start)
        chunk = np.full((1, 6, text.shape[1]), 9, np.float32)
        chunk[0, :count] = text[start : start + count]
        lengths = [np.array([length], np.int64) for length in (count, start)]
        feeds = [*(ort.OrtValue.ortvalue_from_numpy(array) for array in (chunk, *lengths)), *buffers]
        binding = session.io_binding()
        for name, value in zip(names, feeds, strict=True):
            binding.bind_ortvalue_input(name, value)
        results = [ort.OrtValue.ortvalue_from_numpy(array) for array in outputs] + buffers
        for port, value in zip(session.get_outputs(), results, strict=True):
            binding.bind_ortvalue_output(port.name, value)
        session.run_with_iobinding(binding)
        for output, truth in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output[0, :count], truth[start : start + count], rtol=0, atol=1e-5)
