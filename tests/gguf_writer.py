"""Tiny GGUF files, written by the package gguf as llama.cpp's converter writes them.

Names of tensors and keys are that package's own. What the converter does to weights is from its
conversion/llama.py and conversion/gemma.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

SPECIAL = {"bos": 2, "eos": 1, "unk": 3, "pad": 0}
CONTROL, NORMAL = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL


BARE: dict[str, Any] = {
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.block_count": 1,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>"],
    "tokenizer.ggml.token_type": [3, 3, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    **{
        f"tokenizer.ggml.{'unknown' if name == 'unk' else name}_token_id": number
        for name, number in SPECIAL.items()
        if name != "pad"
    },
}
Tensors = dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]
TABLE: Tensors = {"token_embd.weight": (np.zeros((4, 8), np.float32), None)}


def write_bare(path: Path, architecture: str = "llama", tensors: Tensors = TABLE, **keys: Any) -> Path:
    """A GGUF with nothing in it but what the checks look at; a key of None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (BARE | keys).items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    close(writer)
    return path


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(folder: Path, path: Path, kind: gguf.GGMLQuantizationType | None = None, **keys: Any) -> Path:
    """A checkpoint's folder as GGUF; kind: of its matrices; keys: metadata besides, or None for one less."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    add_config(writer, architecture, config)
    add_vocabulary(writer, folder)
    for key, value in keys.items():
        key = key.replace("ARCH", architecture).replace("__", ".")
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in load_file(folder / "model.safetensors").items():
        add_tensor(writer, architecture, config, name, values, kind)
    if (rope := config["rope_parameters"]).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(rope, config["head_dim"]))
    close(writer)
    return path


def add_config(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(full["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if head_dim := config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        if kinds := config.get("layer_types"):
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    """The byte-level tokenizer of the tiny checkpoints, with one merge, which a GGUF must have.

    It is of two digits, and its pre-tokenizer parts digits, so that no text has its token.
    """
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(vocab, key=vocab.__getitem__), "12"]
    special = sum(token.startswith("<") and len(token) > 1 for token in tokens)
    types = [CONTROL] * special + [NORMAL] * (len(tokens) - special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["1 2"])
    for name, number in SPECIAL.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(True)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def add_tensor(
    writer: gguf.GGUFWriter,
    architecture: str,
    config: dict[str, Any],
    name: str,
    values: np.ndarray,
    kind: gguf.GGMLQuantizationType | None,
) -> None:
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module = name.split(".")[-2]
    if architecture == "llama" and module in heads:
        parts = values.reshape(heads[module], 2, -1, *values.shape[1:])
        values = np.ascontiguousarray(parts.swapaxes(1, 2).reshape(values.shape))
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + np.float32(1)
    if kind is None or values.ndim == 1:
        writer.add_tensor(new_name, values)
    else:
        writer.add_tensor(new_name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """How much lower each frequency is than without scaling: of transformers' own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    return (plain / scaled.numpy()).astype(np.float32)
