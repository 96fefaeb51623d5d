"""The shipped files in ONNX Runtime against transformers with its growing cache, on tiny odd models.

Every call is made twice, with different junk in the cache slots and input slots that must not be read: both
calls must agree to the bit. Shapes: B rows, N tokens, P prompt slots, C cache slots, V vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM
from transformers.models.gemma3 import modeling_gemma3

from export.checkpoint import open_checkpoint
from runtime.manifest import Manifest, read

FP32 = 1e-5  # sums in another order: some units of 2^-24 a layer, far below what a wrong mask or slot gives
FP16 = 2e-2  # each matrix and each product's input rounded to 2^-11; errors of all layers together
POISON = (1e4, -3e4)
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
Bundle = Callable[..., Path]


@dataclass(frozen=True)
class Truth:
    """What transformers computes for ids [B, N]: logits [B, N, V]; keys and values [B, KV, N, D]."""

    ids: np.ndarray
    logits: np.ndarray
    cache: list[np.ndarray]  # layer 0 keys, layer 0 values, layer 1 keys, ...


@cache
@torch.no_grad()
def truth(checkpoint: str, rows: int, count: int = CTX) -> Truth:
    """Logits of one token at a time over a growing cache with real sliding layers; keys of a whole pass."""
    model = Gemma3ForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, model.config.vocab_size, (rows, count)))
    growing, whole = DynamicCache(config=model.config), DynamicCache()
    logits = [model(ids[:, i : i + 1], past_key_values=growing).logits for i in range(count)]
    model(ids, past_key_values=whole)
    tensors = [tensor.numpy() for layer in whole.layers for tensor in (layer.keys, layer.values)]
    return Truth(ids.numpy(), torch.cat(logits, 1).numpy(), tensors)


class Replay:
    """One bundle run over the truth's ids, every call checked."""

    def __init__(self, bundle: Path, optimised: bool) -> None:
        self.bundle, self.optimised, self.manifest = bundle, optimised, read(bundle)
        entry = next(iter(self.manifest.graphs.values()))
        self.rows = np.arange(entry.shape.batch)
        self.truth = truth(self.manifest.source.id, len(self.rows))
        self.bound = FP16 if self.manifest.precision == "fp16" else FP32
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.top1: list[bool] = []
        shape = (len(self.rows), self.manifest.model.num_key_value_heads, CTX, self.manifest.model.head_dim)
        self.cache = [np.zeros(shape, np.float32) for _ in self.truth.cache]
        self.lengths = np.zeros(len(self.rows), np.int64)

    def session(self, role: str) -> ort.InferenceSession:
        if role not in self.sessions:
            options = ort.SessionOptions()
            if not self.optimised:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            path = self.bundle / entry_path(self.manifest, role)
            self.sessions[role] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self.sessions[role]

    def prefill(self, lengths: np.ndarray) -> None:
        """A prompt in chunks of P; a row that is through repeats its last token."""
        for start in range(0, int(lengths.max()), P):
            past = np.minimum(start, lengths - 1)
            self.call("prefill", past, np.minimum(P, lengths - past), P)

    def decode(self) -> None:
        self.call("decode", self.lengths, np.ones_like(self.lengths), 1)

    def call(self, role: str, past: np.ndarray, count: np.ndarray, slots: int) -> None:
        session = self.session(role)
        takes_cache = any(value.name == "past_length" for value in session.get_inputs())
        results = []
        for poison, padding in zip(POISON, (0, 271), strict=True):
            ids = np.full((len(self.rows), slots), padding, np.int64)
            for row in self.rows:
                ids[row, : count[row]] = self.truth.ids[row, past[row] : past[row] + count[row]]
            feeds: dict[str, np.ndarray] = {"input_ids": ids}
            if role == "prefill":
                feeds["prompt_length"] = count
            if takes_cache:
                poisoned = list(poisoned_after(self.cache, past, poison))
                names = [value.name for value in session.get_inputs() if value.name.startswith("past_key")]
                feeds |= {"past_length": past, **dict(zip(names, poisoned, strict=True))}
            logits, *present = session.run(None, feeds)
            if takes_cache:
                self.assert_slots_untouched(poisoned, present, past, count)
            results.append((logits, list(poisoned_after(present, past + count, 0.0))))
        np.testing.assert_array_equal(results[0][0], results[1][0], "junk reached the logits")
        for first, second in zip(results[0][1], results[1][1], strict=True):
            np.testing.assert_array_equal(first, second, "junk reached the cache")
        self.lengths = past + count
        self.compare(*results[0])
        for buffer, block in zip(self.cache, results[0][1], strict=True):
            buffer[:, :, : block.shape[2]] = block

    def assert_slots_untouched(
        self, fed: list[np.ndarray], present: list[np.ndarray], past: np.ndarray, count: np.ndarray
    ) -> None:
        """Only the slots of this call's valid tokens may differ from what was fed."""
        for before, after in zip(fed, present, strict=True):
            for row in self.rows:
                for kept in (slice(None, past[row]), slice(past[row] + count[row], None)):
                    np.testing.assert_array_equal(before[row, :, kept], after[row, :, kept])

    def compare(self, logits: np.ndarray, present: list[np.ndarray]) -> None:
        for row, length in enumerate(self.lengths):
            expected, where = self.truth.logits[row, length - 1], f"row {row}, length {length}"
            assert relative_error(logits[row, 0], expected) <= self.bound, where
            self.top1.append(bool(logits[row, 0].argmax() == expected.argmax()))
            for index, (block, true) in enumerate(zip(present, self.truth.cache, strict=True)):
                error = relative_error(block[row, :, :length], true[row, :, :length])
                assert error <= self.bound, f"{where}, layer {index // 2}"


def entry_path(manifest: Manifest, role: str) -> str:
    entry = manifest.graph(role)
    assert entry is not None
    return entry.file.path


def poisoned_after(cache: list[np.ndarray], lengths: np.ndarray, poison: float) -> Iterator[np.ndarray]:
    for buffer in cache:
        copy = buffer.copy()
        for row, length in enumerate(lengths):
            copy[row, :, length:] = poison
        yield copy


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def lengths_of(prompt: int, rows: int) -> np.ndarray:
    """Rows of a batch differ by 5 tokens, more than a window."""
    return np.maximum(1, prompt - 5 * np.arange(rows))


@pytest.mark.parametrize("name", CASES)
def test_prompts_around_the_slots(tiny_bundle: Bundle, name: str) -> None:
    bundle = tiny_bundle(**CASES[name])
    prompts = [1, 2, P - 1, P] + ([] if CASES[name].get("shapes") is NO_CTX else [P + 1, 2 * P + 1, CTX])
    replay = Replay(bundle, optimised=True)
    for prompt in prompts:
        replay.prefill(lengths_of(prompt, len(replay.rows)))


@pytest.mark.parametrize(
    ("name", "optimised"), [*((name, True) for name in CASES), (next(iter(CASES)), False)]
)
def test_decode_up_to_the_last_slot(tiny_bundle: Bundle, name: str, optimised: bool) -> None:
    replay = Replay(tiny_bundle(**CASES[name]), optimised)
    replay.prefill(lengths_of(1 + 5 * len(replay.rows) - 5, len(replay.rows)))
    assert replay.lengths.min() == 1
    while replay.lengths.max() < CTX:
        replay.decode()
    replay.prefill(lengths_of(P, len(replay.rows)))  # a shorter text over the buffers of a full one
    replay.decode()
    # A random model's two best logits may lie closer than fp16 resolves, so some may swap.
    assert np.mean(replay.top1) >= (0.95 if replay.bound == FP16 else 1.0)


def test_prompt_in_chunks_without_optimisations(tiny_bundle: Bundle) -> None:
    replay = Replay(tiny_bundle(**CASES["global layer second of five"]), optimised=False)
    replay.prefill(np.array([2 * P + 1]))


def test_both_config_schemas_give_the_same_graphs(tiny_bundle: Bundle, tiny_checkpoint: Bundle) -> None:
    bundles = [tiny_bundle([("decode", 1, CTX)], **schema) for schema in (PUBLISHED, TRANSFORMERS_5)]
    published, new = (read(bundle) for bundle in bundles)
    assert published.model == new.model
    assert [layer.window for layer in published.model.layers] == [5, None]
    assert published.weights == new.weights
    assert published.graphs["decode-40"] == new.graphs["decode-40"]  # file hashes are in it
    first, second = (truth(str(tiny_checkpoint(**schema)), 1) for schema in (PUBLISHED, TRANSFORMERS_5))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_the_rope_settings_of_the_schemas_are_felt(tiny_checkpoint: Bundle) -> None:
    """The test above could pass with both schemas ignored."""
    base = truth(str(tiny_checkpoint(**TRANSFORMERS_5)), 1).logits
    for name, value in (("rope_theta", 1e6), ("rope_local_base_freq", 1e4), ("rope_scaling", None)):
        other = truth(str(tiny_checkpoint(**{**PUBLISHED, name: value})), 1).logits
        assert relative_error(other, base) > 100 * FP32, name


def test_transformers_ignores_attn_logit_softcapping_of_gemma_3(tiny_checkpoint: Bundle) -> None:
    """Gemma3Attention.forward of transformers 5.23 reads the cap into an attribute and never passes it on.

    The reference decides, so the graphs ignore it too. When this fails, transformers has changed: the parity
    case with `attn_logit_softcapping` then shows whether the cap arrives as `softcap` in our attention.
    """
    without = truth(str(tiny_checkpoint()), 1).logits
    capped = truth(str(tiny_checkpoint(attn_logit_softcapping=0.1)), 1).logits
    np.testing.assert_array_equal(without, capped)
    assert "softcap" not in inspect.getsource(modeling_gemma3.Gemma3Attention.forward)


def test_the_reference_of_a_checkpoint_is_the_model_of_transformers(tiny_checkpoint: Bundle) -> None:
    folder = tiny_checkpoint(**PUBLISHED)
    expected = truth(str(folder), 1)
    model = open_checkpoint(str(folder)).load()
    with torch.no_grad():
        found = model(torch.from_numpy(expected.ids)).logits.numpy()
    assert relative_error(found, expected.logits) <= FP32
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == PUBLISHED["rope_theta"]
