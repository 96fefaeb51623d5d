"""A GGUF's metadata as config.json, or what of it is refused; torch is not needed.

transformers reads some of these keys and keeps silent about the others. Here each key under the
architecture's name is used, found to change nothing, or refused by its name.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from stillgraph.exporter.gguf_file.header import Header
from stillgraph.exporter.gguf_file.tensors import FREQUENCIES, values

# llama.cpp's name of an architecture: transformers' class, and the model_type of its config
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
ORIGINAL = "export the original checkpoint"
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
EPSILON = "attention.layer_norm_rms_epsilon"
OTHERS = (
    "vocab_size attention.head_count_kv attention.key_length attention.value_length attention.causal"
    " rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.finetuned"
    " expert_count expert_used_count"
).split()
OF_GEMMA = "attention.sliding_window attention.sliding_window_pattern final_logit_softcapping".split()
KNOWN = {
    "gemma2": [*OF_GEMMA, "attn_logit_softcapping"],
    "gemma3": [*OF_GEMMA, "rope.freq_base_swa"],
}
PERIODS = {"gemma2": 2, "gemma3": 6}  # every second, every sixth layer has no window
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries are scaled otherwise
WHOLE = "as llama.cpp's llama-gguf-split --merge makes it"
# What a GGUF may be besides a model, by its general.type.
KINDS = {
    "mmproj": ("the part of a model that sees (mmproj)", "name the GGUF of its text model"),
    "adapter": ("a LoRA without its base model", "merge them with llama.cpp's llama-export-lora"),
    "imatrix": ("an importance matrix", "name the GGUF of a model"),
}


def check_kind(header: Header) -> str:
    """The architecture. Raises StillgraphError for what is no whole model, or of no known architecture."""
    named = re.search(r"-(\d{5})-of-(\d{5})\.gguf$", header.path.name)
    count = header.get("split.count", int) or (int(named[2]) if named else 1)
    if count > 1:
        header.refuse(f"it is one of {count} parts of a model", f"name one file, {WHOLE}")
    architecture = header.get("general.architecture", str)
    kind = "mmproj" if architecture == "clip" else header.get("general.type", str) or "model"
    if kind != "model":
        what, remedy = KINDS.get(kind, (f"of the kind {kind!r:.40}", "name the GGUF of a model"))
        header.refuse(f"it is {what}", remedy)
    if architecture not in ARCHITECTURES:
        known = f"use {', '.join(ARCHITECTURES)}, or {ORIGINAL}"
        header.refuse(f"architecture {architecture!r:.40} is not supported in a GGUF", known)
    return str(architecture)


def config_of(header: Header) -> dict[str, Any]:
    """config.json of a GGUF. Raises StillgraphError for what is missing, and for what would be lost."""
    architecture = check_kind(header)
    facts = _Facts(header, architecture)
    facts.check_keys([*SIZES, EPSILON, *OTHERS, *KNOWN.get(architecture, [])])
    made = {name: facts.needed(key, int) for key, name in SIZES.items()}
    heads = made["num_attention_heads"]
    head_dim = facts.get("attention.key_length", int) or facts.get("rope.dimension_count", int)
    head_dim = head_dim or made["hidden_size"] // max(heads, 1)
    if (least := min(head_dim, *made.values())) < 1:
        header.refuse(f"a size is {least}", "download the file again")
    if (layers := made["num_hidden_layers"]) > len(header.tensors):
        header.refuse(f"it has {layers} layers of {len(header.tensors)} tensors", "download the file again")
    table = header.tensors.get("token_embd.weight")
    rows = table.shape[0] if table else 0
    facts.check("attention.value_length", head_dim)
    facts.check("rope.dimension_count", head_dim)
    facts.check("vocab_size", rows)
    facts.check("attention.causal", True)
    facts.check("expert_count", 0)
    klass, model_type = ARCHITECTURES[architecture]
    made |= {
        "architectures": [klass],
        "model_type": model_type,
        "dtype": "float32",
        "num_key_value_heads": facts.get("attention.head_count_kv", int) or heads,
        "head_dim": head_dim,
        "rms_norm_eps": _short(facts.needed(EPSILON, float)),
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": facts.rope(head_dim),
    }
    return made | facts.of_gemma(made) if architecture in PERIODS else made


class _Facts:
    """The keys under an architecture's name."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self.architecture = header, architecture

    def get(self, key: str, *kinds: type) -> Any:
        return self.header.get(f"{self.architecture}.{key}", *kinds)

    def needed(self, key: str, *kinds: type) -> Any:
        value = self.get(key, *kinds)
        if value is None:
            self.header.refuse(f"{self.architecture}.{key} is missing", "convert the model again")
        return value

    def check_keys(self, known: list[str]) -> None:
        for key in self.header.metadata:
            family, _, rest = key.partition(".")
            if family == self.architecture and rest not in known:
                value = self.header.metadata[key]
                self.header.refuse(f"{key} = {value!r:.40} is not supported", ORIGINAL)

    def check(self, key: str, expected: object) -> None:
        """Of a key that may be there, and whose value follows from others."""
        value = self.get(key, type(expected))
        if value is not None and value != expected:
            name = f"{self.architecture}.{key}"
            self.header.refuse(f"{name} is {value}, where only {expected} is supported", ORIGINAL)

    def rope(self, head_dim: int) -> dict[str, Any]:
        """transformers' rope_parameters."""
        theta = _short(self.get("rope.freq_base", float) or 10000.0)
        made = {"rope_type": "default", "rope_theta": theta}
        factor = self.get("rope.scaling.factor", float)
        kind = self.get("rope.scaling.type", str) or ("linear" if factor else "none")
        if kind not in ("none", "linear"):
            problem = f"{self.architecture}.rope.scaling.type {kind!r:.40} is not supported"
            self.header.refuse(problem, ORIGINAL)
        if kind == "linear":
            made |= {"rope_type": "linear", "factor": _short(self.needed("rope.scaling.factor", float))}
        if FREQUENCIES in self.header.tensors:
            scaling = llama3_scaling(values(self.header, FREQUENCIES), theta, head_dim)
            if scaling is None or kind == "linear":
                self.header.refuse(f"{FREQUENCIES} that are not Llama 3's are not supported", ORIGINAL)
            made |= scaling
        if self.architecture != "gemma3":
            return made
        local = _short(self.get("rope.freq_base_swa", float) or 10000.0)
        return {
            "full_attention": made,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }

    def of_gemma(self, made: dict[str, Any]) -> dict[str, Any]:
        """Windows, caps and the scale of the queries, with llama.cpp's defaults."""
        layers, heads = made["num_hidden_layers"], made["num_attention_heads"]
        pattern = self.get("attention.sliding_window_pattern", int, list)
        if not isinstance(pattern, list):
            period = pattern or PERIODS[self.architecture]
            pattern = [(layer + 1) % period != 0 for layer in range(layers)]
        largest = layers == LARGEST[self.architecture]
        read = self.needed if self.architecture == "gemma2" else self.get
        caps = {name: read(name, float) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        return {
            "sliding_window": self.needed("attention.sliding_window", int),
            "layer_types": [f"{'sliding' if slides else 'full'}_attention" for slides in pattern],
            "query_pre_attn_scalar": made["hidden_size"] // heads if largest else made["head_dim"],
            **{name: cap and _short(cap) for name, cap in caps.items()},
        }


def llama3_scaling(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """transformers' parameters for the divisors of the frequencies [head_dim / 2] that a GGUF holds.

    None where they are not those of Llama 3.1 to 3.3, which differ in their factor alone. The formula is that
    of `_compute_llama3_parameters` in transformers.
    """
    low, high, context, factor = 1.0, 4.0, 8192, float(factors.max(initial=1.0))
    turns = context / (2 * np.pi) * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if factors.shape != turns.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), 1e-4):
        return None
    return {
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _short(value: float) -> float:
    """The decimal number that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
