"""The shipped files in ONNX Runtime against transformers with its growing cache, on tiny odd models.

Both targets; how a call is checked is in conftest.py. Shapes: P prompt tokens, C cache slots.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3

from stillgraph import load
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.manifest import read

FP32 = 1e-5  # sums in another order: some units of 2^-24 a layer, far below what a wrong mask or slot gives
P, CTX = 16, 40
SLIDING, FULL = "sliding_attention", "full_attention"
NO_CTX = [("prefill", P, None), ("decode", 1, CTX)]
PUBLISHED: dict[str, Any] = {  # the keys of the config.json files on the hub
    "layer_types": None,
    "rope_parameters": None,
    "rope_theta": 500_000.0,
    "rope_local_base_freq": 7_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window_pattern": 2,
}
TRANSFORMERS_5: dict[str, Any] = {  # the same model as transformers 5 saves it
    "layer_types": [SLIDING, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 7_000.0},
    },
}
CASES: dict[str, dict[str, Any]] = {
    "global layer second of five": {"num_hidden_layers": 5, "layer_types": [SLIDING, FULL, *[SLIDING] * 3]},
    "all sliding, 6 heads over 3, head not tied": {
        "layer_types": [SLIDING] * 2, "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 8,
        "tie_word_embeddings": False,
    },
    "all full, 4 heads over 1, softcaps, biases": {
        "layer_types": [FULL] * 2, "num_key_value_heads": 1, "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0, "attention_bias": True,
    },
    "batch 3, linear RoPE, published config": {"batch": 3, "num_attention_heads": 6, **PUBLISHED},
    "batch 2, prefill from nothing": {"batch": 2, "shapes": NO_CTX, "sliding_window": 7},
    "fp16": {"precision": "fp16"},
    "fp16, head not tied": {"precision": "fp16", "tie_word_embeddings": False},
}  # fmt: skip
ORT = {"target": "onnxruntime"}
FUSED: dict[str, dict[str, Any]] = {  # heads of 24 are rotated before the op, of 16 and 256 in it
    "fused, global layer second of five": {**CASES["global layer second of five"], **ORT},
    "fused, all sliding, 6 heads over 3, head not tied, slack over the window": {
        **CASES["all sliding, 6 heads over 3, head not tied"], **ORT, "slack": 20,
    },
    "fused, all full, 4 heads over 1, head size 256, softcaps, biases": {
        **CASES["all full, 4 heads over 1, softcaps, biases"], **ORT, "head_dim": 256,
    },
    "fused, batch 3, linear RoPE, published config": {
        **CASES["batch 3, linear RoPE, published config"], **ORT,
    },
    "fused, slack under the window of 48, full layer first, 4 heads over 1, head size 16": {
        **ORT, "shapes": [("prefill", P, 120), ("decode", 1, 120)], "max_position_embeddings": 120,
        "sliding_window": 48, "layer_types": [FULL, SLIDING], "num_key_value_heads": 1, "head_dim": 16,
        "final_logit_softcapping": 5.0, "tie_word_embeddings": False,
    },
    "fused, window over ctx, batch 2, biases": {
        **ORT, "sliding_window": 48, "batch": 2, "attention_bias": True,
    },
    "fused, no slack at all": {
        **ORT, "slack": 0, "shapes": [("prefill", 1, CTX), ("decode", 1, CTX)], "head_dim": 16,
    },
}  # fmt: skip
CASES |= FUSED
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CASES |= {
    "Llama 3, head not tied, biases": {
        "family": "llama", "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": LLAMA3 | {"rope_theta": 1e4, "original_max_position_embeddings": 16},
    },
    "Llama, tied, fp16": {"family": "llama", "precision": "fp16"},
    "fused, Llama, tied, biases, batch 2": {
        "family": "llama", **ORT, "attention_bias": True, "mlp_bias": True, "batch": 2,
    },
    "Qwen 2, every second layer sliding": {"family": "qwen2"},
    "fused, Qwen 2, every second layer sliding, yarn": {"family": "qwen2", **ORT, "rope_parameters": YARN},
    "fused, Qwen 2, all full, head not tied": {
        "family": "qwen2", **ORT, "use_sliding_window": False, "layer_types": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
Bundle = Callable[..., Path]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def lengths_of(prompt: int, rows: int) -> np.ndarray:
    """Rows of a batch differ by 5 tokens, more than a window."""
    return np.maximum(1, prompt - 5 * np.arange(rows))


@pytest.mark.parametrize("name", CASES)
def test_prompts_around_max_len(tiny_bundle: Bundle, replay_of: Any, name: str) -> None:
    replay = replay_of(tiny_bundle(**CASES[name]), optimized=True)
    prompts = [1, 2, P - 1, P]
    if CASES[name].get("shapes") is not NO_CTX:
        prompts += [P + 1, 2 * P + 1, replay.ctx - 1, replay.ctx]  # the last chunk is padded past ctx
    for prompt in prompts:
        replay.prefill(lengths_of(prompt, len(replay.rows)))


@pytest.mark.parametrize(
    ("name", "optimized"),
    [*((name, True) for name in CASES), (next(iter(CASES)), False), (next(iter(FUSED)), False)],
)
def test_decode_up_to_the_last_slot(tiny_bundle: Bundle, replay_of: Any, name: str, optimized: bool) -> None:
    replay = replay_of(tiny_bundle(**CASES[name]), optimized)
    replay.prefill(lengths_of(1 + 5 * len(replay.rows) - 5, len(replay.rows)))
    assert replay.lengths.min() == 1
    while replay.lengths.max() < replay.ctx:
        replay.decode()
    replay.prefill(lengths_of(P, len(replay.rows)))  # a shorter text over the buffers of a full one
    replay.decode()
    # A random model's two best logits may lie closer than fp16 resolves, so some may swap.
    assert np.mean(replay.top1) >= (0.95 if CASES[name].get("precision") == "fp16" else 1.0)


@pytest.mark.parametrize("name", [next(iter(CASES)), next(iter(FUSED))])
def test_prompt_in_chunks_without_optimizations(tiny_bundle: Bundle, replay_of: Any, name: str) -> None:
    replay = replay_of(tiny_bundle(**CASES[name]), optimized=False)
    replay.prefill(np.array([2 * P + 1]))


@pytest.mark.parametrize("counts", [(1,), (3, P, 2, P), (P, P - 1, 9)])
def test_chunks_that_are_not_full(tiny_bundle: Bundle, replay_of: Any, counts: tuple[int, ...]) -> None:
    """As in a chat: a prompt, some tokens, and the next prompt behind them, with rows out of step."""
    replay = replay_of(tiny_bundle(**CASES["fused, batch 3, linear RoPE, published config"]), True)
    for count in counts:
        rows = np.maximum(1, count - np.array([0, 1, 7]))
        replay.call("prefill", replay.lengths, np.minimum(rows, CTX - replay.lengths))
        if replay.lengths.max() < CTX:
            replay.decode()


def test_an_engine_of_either_target_gives_the_same_tokens(tiny_bundle: Bundle) -> None:
    """Requests of all lengths on one engine, rows out of step, windows moved on and gone back to."""
    name = "batch 3, linear RoPE, published config"
    engines = [load(tiny_bundle(**CASES[case]), threads=1) for case in (f"fused, {name}", name)]
    rng, texts = np.random.default_rng(0), [[2], [2], [2]]
    for _ in range(12):
        prompts = [
            [*text[: rng.integers(0, 40)], *rng.integers(6, 272, rng.integers(1, 12)).tolist()][:40]
            for text in texts[: rng.integers(1, 4)]
        ]
        answers = []
        for engine in engines:
            rows: list[list[int]] = [[] for _ in prompts]
            for row, step in engine.stream_batch(prompts, max_new_tokens=15):
                rows[row].append(step.token)
            answers.append(rows)
        assert answers[0] == answers[1]
        texts[: len(prompts)] = [[*p, *a] for p, a in zip(prompts, answers[0], strict=True)]


def test_both_config_schemas_give_the_same_graphs(
    tiny_bundle: Bundle, tiny_checkpoint: Bundle, truth: Any
) -> None:
    bundles = [tiny_bundle([("decode", 1, CTX)], **schema) for schema in (PUBLISHED, TRANSFORMERS_5)]
    published, new = (read(bundle) for bundle in bundles)
    assert published.model == new.model
    assert [layer.window for layer in published.model.layers] == [5, None]
    assert published.weights == new.weights
    assert published.graphs["decode-40"] == new.graphs["decode-40"]  # file hashes are in it
    first, second = (truth(str(tiny_checkpoint(**schema)), 1) for schema in (PUBLISHED, TRANSFORMERS_5))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_the_rope_settings_of_the_schemas_are_felt(tiny_checkpoint: Bundle, truth: Any) -> None:
    """The test above could pass with both schemas ignored."""
    base = truth(str(tiny_checkpoint(**TRANSFORMERS_5)), 1).logits
    for name, value in (("rope_theta", 1e6), ("rope_local_base_freq", 1e4), ("rope_scaling", None)):
        other = truth(str(tiny_checkpoint(**{**PUBLISHED, name: value})), 1).logits
        assert relative_error(other, base) > 100 * FP32, name


def test_transformers_ignores_attn_logit_softcapping_of_gemma_3(tiny_checkpoint: Bundle, truth: Any) -> None:
    """Gemma3Attention.forward of transformers 5.23 reads the cap into an attribute and never passes it on.

    The reference decides, so the graphs ignore it too. When this fails, transformers has changed: the parity
    case with `attn_logit_softcapping` then shows whether the cap arrives as `softcap` in our attention.
    """
    without = truth(str(tiny_checkpoint()), 1).logits
    capped = truth(str(tiny_checkpoint(attn_logit_softcapping=0.1)), 1).logits
    np.testing.assert_array_equal(without, capped)
    assert "softcap" not in inspect.getsource(modeling_gemma3.Gemma3Attention.forward)


def test_the_reference_of_a_checkpoint_is_the_model_of_transformers(
    tiny_checkpoint: Bundle, truth: Any
) -> None:
    folder = tiny_checkpoint(**PUBLISHED)
    expected = truth(str(folder), 1)
    model = open_checkpoint(str(folder)).load()
    with torch.no_grad():
        found = model(torch.from_numpy(expected.ids)).logits.numpy()
    assert relative_error(found, expected.logits) <= FP32
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == PUBLISHED["rope_theta"]
