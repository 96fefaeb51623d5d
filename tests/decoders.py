"""Tiny configs of families of decoders. One that is listed here takes part in every test over all of them.

Heads in groups of three, hidden sizes that are odd where the architecture allows it, head sizes of no power
of two, windows below a chunk of the prefill. `initializer_range` is read by `tests.conftest.randomize`.
"""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 51,
    "intermediate_size": 83,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def decoder(architecture: str, model_type: str, **values: Any) -> dict[str, Any]:
    return COMMON | {"architectures": [architecture], "model_type": model_type} | values


DECODERS: dict[str, dict[str, Any]] = {
    "qwen3": decoder(
        "Qwen3ForCausalLM", "qwen3", attention_bias=True, use_sliding_window=True, sliding_window=5,
        layer_types=[SLIDING, FULL],
    ),
    "mistral": decoder(
        "MistralForCausalLM", "mistral", sliding_window=5, head_dim=40, tie_word_embeddings=True
    ),
    "ministral": decoder(
        "MinistralForCausalLM", "ministral", sliding_window=5, layer_types=[FULL, SLIDING]
    ),
    "ministral3": decoder(
        "Ministral3ForCausalLM", "ministral3", head_dim=32, sliding_window=9, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 7, "llama_4_scaling_beta": 0.3,
        },
    ),
    "gemma2": decoder(
        "Gemma2ForCausalLM", "gemma2", hidden_size=54, query_pre_attn_scalar=20, sliding_window=5,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0, attention_bias=True,
        tie_word_embeddings=True,
    ),
    "smollm3": decoder(
        "SmolLM3ForCausalLM", "smollm3", no_rope_layer_interval=2, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "granite": decoder(
        "GraniteForCausalLM", "granite", head_dim=40, attention_bias=True, mlp_bias=True,
        embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.4, logits_scaling=1.7,
    ),
    "phi3": decoder(
        "Phi3ForCausalLM", "phi3", hidden_size=72, head_dim=None, num_attention_heads=3,
        num_key_value_heads=1, sliding_window=5, partial_rotary_factor=0.75,
    ),
    "phi3, longrope": decoder(
        "Phi3ForCausalLM", "phi3", hidden_size=96, head_dim=None, num_attention_heads=3,
        num_key_value_heads=1, partial_rotary_factor=0.75, max_position_embeddings=256,
        original_max_position_embeddings=40, tie_word_embeddings=True, rope_parameters=None,
        rope_scaling={
            "type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(12)],
            "long_factor": [2.0 + 0.7 * i for i in range(12)],
        },
    ),
    "olmo2": decoder("Olmo2ForCausalLM", "olmo2", attention_bias=True),
}  # fmt: skip
