"""Checkpoints of Gemma 3's geometries: random weights, any number of layers, written layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPREAD = 0.02  # of the weights, as transformers draws them
FULL_EVERY = 6  # layers: five with a window, one without


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Gemma 3. The checkpoint has `layers` of them, the sixth of each six without a window."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    window: int
    layers: int
    head: int = 256
    vocabulary: int = 262144


def gemma_4b(layers: int) -> Geometry:
    return Geometry(hidden=2560, inner=10240, heads=8, kv_heads=4, window=1024, layers=layers)


GEMMA_270M = Geometry(hidden=640, inner=2048, heads=4, kv_heads=1, window=512, layers=18)


def config(size: Geometry) -> dict[str, Any]:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["sliding_attention" if (i + 1) % FULL_EVERY else "full_attention" for i in range(size.layers)]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head,
        "query_pre_attn_scalar": size.head,
        "sliding_window": size.window,
        "layer_types": kinds,
        "rope_parameters": rope,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write(folder: Path, size: Geometry) -> Path:
    """The checkpoint, in a file for each layer; one that is there is taken as it is."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    places = dict[str, str]()
    for index, tensors in enumerate(_parts(size)):
        name = f"model-{index + 1:05}-of-{size.layers + 1:05}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index_file = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="ascii")
    (folder / "config.json").write_text(json.dumps(config(size)), encoding="ascii")
    return folder


def _parts(size: Geometry) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD, generator=generator)

    def norm(size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    wide, narrow = size.heads * size.head, size.kv_heads * size.head
    embedding = random(size.vocabulary, size.hidden)
    yield {"model.embed_tokens.weight": embedding, "model.norm.weight": norm(size.hidden)}
    for layer in range(size.layers):
        start = f"model.layers.{layer}"
        yield {
            f"{start}.self_attn.q_proj.weight": random(wide, size.hidden),
            f"{start}.self_attn.k_proj.weight": random(narrow, size.hidden),
            f"{start}.self_attn.v_proj.weight": random(narrow, size.hidden),
            f"{start}.self_attn.o_proj.weight": random(size.hidden, wide),
            f"{start}.self_attn.q_norm.weight": norm(size.head),
            f"{start}.self_attn.k_norm.weight": norm(size.head),
            f"{start}.mlp.gate_proj.weight": random(size.inner, size.hidden),
            f"{start}.mlp.up_proj.weight": random(size.inner, size.hidden),
            f"{start}.mlp.down_proj.weight": random(size.hidden, size.inner),
        } | {
            f"{start}.{name}_layernorm.weight": norm(size.hidden)
            for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        }
