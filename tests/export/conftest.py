"""The truth of a tiny checkpoint, and a bundle's files run against it in ONNX Runtime.

Every call is made twice, with different junk in the cache slots and input tokens that must not be read: both
calls must agree to the bit. Shapes: B rows, N tokens, S tokens of a call, C cache slots, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, DynamicCache

from stillgraph import Step
from stillgraph.exporter.ort import run
from stillgraph.manifest import GraphEntry, read

FP32 = 1e-5  # sums in another order: some units of 2^-24 a layer, far below what a wrong mask or slot gives
FP16 = 2e-2  # each matrix and each product's input rounded to 2^-11; errors of all layers together
POISON = (1e4, -3e4)


@dataclass(frozen=True)
class Truth:
    """What transformers computes for ids [B, N]: logits [B, N, V]; keys and values [B, KV, N, D]."""

    ids: np.ndarray
    logits: np.ndarray
    cache: list[np.ndarray]  # layer 0 keys, layer 0 values, layer 1 keys, ...


@cache
def original_of(checkpoint: str) -> Any:
    """The model of a checkpoint, as transformers loads it, in fp32 with eager attention."""
    (architecture,) = json.loads((Path(checkpoint) / "config.json").read_text())["architectures"]
    kind = getattr(transformers, architecture)
    return kind.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


@cache
@torch.no_grad()
def truth_of(checkpoint: str, rows: int, count: int = 40) -> Truth:
    """Logits of one token at a time over a growing cache with real sliding layers; keys of a whole pass."""
    model = original_of(checkpoint)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, model.config.vocab_size, (rows, count)))
    growing, whole = DynamicCache(config=model.config), DynamicCache()
    logits = [model(ids[:, i : i + 1], past_key_values=growing).logits for i in range(count)]
    model(ids, past_key_values=whole)
    tensors = [tensor.numpy() for layer in whole.layers for tensor in (layer.keys, layer.values)]
    return Truth(ids.numpy(), torch.cat(logits, 1).numpy(), tensors)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class CheckedReplay:
    """One bundle run over the truth's ids, every call checked. `cache` holds what the graphs returned."""

    def __init__(self, bundle: Path, optimized: bool) -> None:
        self.bundle, self.optimized, self.manifest = bundle, optimized, read(bundle)
        self.shape = self.entry("decode").shape
        self.rows, self.ctx = np.arange(self.shape.batch), self.shape.limit
        self.truth = truth_of(self.manifest.source.id, len(self.rows), self.ctx)
        self.bound = FP16 if self.manifest.precision == "fp16" else FP32
        self.sessions: dict[str, ort.InferenceSession] = {}
        self.top1: list[bool] = []
        spec = self.manifest.model
        self.layers = [spec.layers[index] for index in spec.cached for _ in ("key", "value")]
        shapes = [
            (len(self.rows), layer.kv_heads, self.shape.capacity(layer), layer.head_dim)
            for layer in self.layers
        ]
        self.cache = [np.zeros(shape, np.float32) for shape in shapes]
        self.lengths = np.zeros(len(self.rows), np.int64)

    def entry(self, role: str) -> GraphEntry:
        entry = self.manifest.graph(role)
        assert entry is not None
        return entry

    def session(self, role: str) -> ort.InferenceSession:
        if role not in self.sessions:
            options = ort.SessionOptions()
            if not self.optimized:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            path = self.bundle / self.entry(role).file.path
            self.sessions[role] = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self.sessions[role]

    def prefill(self, lengths: np.ndarray) -> None:
        """A prompt in chunks that all rows end with; a row too short for that waits at its first slot."""
        max_len = self.entry("prefill").shape.max_len
        done = np.zeros_like(lengths)
        for left in range(-(-int(lengths.max()) // max_len), 0, -1):
            waits = lengths - done < left
            count = np.where(waits, 1, np.minimum(max_len, lengths - done - left + 1))
            self.call("prefill", done, count)
            done = np.where(waits, done, done + count)

    def decode(self) -> None:
        self.call("decode", self.lengths, np.ones_like(self.lengths))

    def call(self, role: str, past: np.ndarray, count: np.ndarray) -> None:
        entry, session = self.entry(role), self.session(role)
        takes_cache, max_len = entry.shape.ctx is not None, entry.shape.max_len
        results = []
        for poison, padding in zip(POISON, (0, 271), strict=True):
            ids = np.full((len(self.rows), max_len), padding, np.int64)
            for row in self.rows:
                ids[row, : count[row]] = self.truth.ids[row, past[row] : past[row] + count[row]]
            feeds: dict[str, np.ndarray] = {"input_ids": ids}
            if role == "prefill":
                feeds["prompt_length"] = count
            if takes_cache:
                poisoned = list(self.poisoned(self.cache, past, poison))
                names = [alias.input for alias in entry.aliases]
                copies = (buffer.copy() for buffer in poisoned)  # the call may write into what it is fed
                feeds |= {"past_length": past, **dict(zip(names, copies, strict=True))}
            logits, *present = run(session, feeds, entry.aliases)
            if takes_cache:
                self.assert_slots_untouched(poisoned, present, past, count)
            results.append((logits, list(self.poisoned(present, past + count, 0.0))))
        np.testing.assert_array_equal(results[0][0], results[1][0], "junk reached the logits")
        for first, second in zip(results[0][1], results[1][1], strict=True):
            np.testing.assert_array_equal(first, second, "junk reached the cache")
        self.lengths = past + count
        self.compare(*results[0])
        for buffer, block in zip(self.cache, results[0][1], strict=True):
            buffer[:, :, : block.shape[2]] = block

    def first(self, index: int, length: int) -> int:
        """The position in slot 0 of a buffer after `length` tokens of its row."""
        return self.shape.first_position(self.layers[index], int(length))

    def poisoned(self, cache: list[np.ndarray], lengths: np.ndarray, poison: float) -> Iterator[np.ndarray]:
        """Copies with `poison` in every slot that holds none of its row's tokens."""
        for index, buffer in enumerate(cache):
            copy = buffer.copy()
            for row, length in enumerate(lengths):
                copy[row, :, length - self.first(index, length) :] = poison
            yield copy

    def assert_slots_untouched(
        self, fed: list[np.ndarray], present: list[np.ndarray], past: np.ndarray, count: np.ndarray
    ) -> None:
        """Only the slots of this call's valid tokens may differ from what was fed.

        GroupQueryAttention may write the padding behind them, and moves what a sliding layer holds.
        """
        for layer, before, after in zip(self.layers, fed, present, strict=True):
            if self.shape.evicts(layer):
                continue
            for row in self.rows:
                behind = past[row] + count[row] if self.shape.slack is None else before.shape[2]
                for kept in (slice(None, past[row]), slice(behind, None)):
                    np.testing.assert_array_equal(before[row, :, kept], after[row, :, kept])

    def compare(self, logits: np.ndarray, present: list[np.ndarray]) -> None:
        for row, length in enumerate(self.lengths):
            expected, where = self.truth.logits[row, length - 1], f"row {row}, length {length}"
            assert relative_error(logits[row, 0], expected) <= self.bound, where
            self.top1.append(bool(logits[row, 0].argmax() == expected.argmax()))
            for index, (block, true) in enumerate(zip(present, self.truth.cache, strict=True)):
                first = self.first(index, length)
                error = relative_error(block[row, :, : length - first], true[row, :, first:length])
                assert error <= self.bound, f"{where}, layer {index // 2}"


@pytest.fixture(scope="session")
def truth() -> Callable[..., Truth]:
    """`truth(checkpoint, rows, count=40)`: what transformers computes for random ids."""
    return truth_of


@pytest.fixture(scope="session")
def original() -> Callable[[str], Any]:
    """`original(checkpoint)`: the model as transformers loads it."""
    return original_of


def drawn_of(seed: int, width: int = 20, height: int = 14) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def follows_of(
    steps: Sequence[Step], checkpoint: str, ids: list[int], images: list[Image.Image], count: int
) -> bool:
    """Whether steps are `count` greedy ones of transformers: its tokens, and the log probabilities of these.

    One pass over the prompt and the tokens says so: each must be the best behind all before it. A small model
    may repeat one token whatever it is shown; what it is shown is in the probabilities.
    """
    model, tokens = original_of(checkpoint), [step.token for step in steps]
    text = torch.tensor([ids + tokens])
    given: dict[str, Any] = {}
    if images:
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        given["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = (text == model.config.image_token_id).long()
    logprobs, best = model(input_ids=text, **given).logits[0, len(ids) - 1 : -1].log_softmax(-1).max(-1)
    # Logits of these models are below 10, and off by 1e-5 of that at most.
    np.testing.assert_allclose([step.logprob for step in steps], logprobs, rtol=0, atol=1e-4)
    return len(tokens) == count and best.tolist() == tokens


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Image.Image]:
    """`drawn(seed, width=20, height=14)`: a picture of noise."""
    return drawn_of


@pytest.fixture(scope="session")
def follows() -> Callable[..., bool]:
    """`follows(steps, checkpoint, ids, images, count)`: whether transformers makes the same of a prompt."""
    return follows_of


@pytest.fixture(scope="session")
def replay_of() -> type[CheckedReplay]:
    """`replay_of(bundle, optimized)`: a bundle over the truth's ids."""
    return CheckedReplay
