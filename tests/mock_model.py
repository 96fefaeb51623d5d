"""A model that anyone can follow, as numpy and as ONNX: its next token is sum((slot + 1) * id) mod V.

Its keys hold the ids and its values twice the ids: a wrong slot, order or length shows as a wrong token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from stillgraph.calling import Calling, Tokens
from stillgraph.engine import Engine
from stillgraph.kv_cache import GraphPair
from stillgraph.manifest import (
    Alias,
    CheckpointSource,
    File,
    GraphEntry,
    Manifest,
    Weights,
)
from stillgraph.ports import input_ports, output_ports
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec
from stillgraph.weight_tensor import WeightTensor

SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
CHAT = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"


def next_token(ids: Sequence[int], vocab: int) -> int:
    return sum((slot + 1) * token for slot, token in enumerate(ids)) % vocab


def greedy_tokens(ids: Sequence[int], count: int, vocab: int) -> list[int]:
    ids, start = list(ids), len(ids)
    for _ in range(count):
        ids.append(next_token(ids, vocab))
    return ids[start:]


def spec(vocab: int) -> ModelSpec:
    return ModelSpec(
        architecture="MockForCausalLM",
        vocab_size=vocab,
        hidden_size=1,
        num_attention_heads=1,
        max_position_embeddings=1024,
        layers=(LayerSpec(kind="full_attention", kv_heads=1, head_dim=1),),
    )


def entry(shape: GraphShape, vocab: int, in_place: bool = False, file: File | None = None) -> GraphEntry:
    names = (
        [(f"present.0.{kind}", f"past_key_values.0.{kind}") for kind in ("key", "value")] if shape.ctx else []
    )
    return GraphEntry(
        shape=shape,
        file=file or File(path=f"{shape.name}.onnx", nbytes=0, sha256="0" * 64),
        inputs=input_ports(spec(vocab), shape),
        outputs=output_ports(spec(vocab), shape),
        aliases=tuple(Alias(output=present, input=past, same_buffer=in_place) for present, past in names),
    )


@dataclass
class Mock:
    """Loads numpy graphs and remembers what was loaded and how they were called."""

    vocab: int = 11
    calls: list[tuple[str, list[int], list[int]]] = field(default_factory=list)  # (role, past, new) lengths
    binds: int = 0
    alive: list[str] = field(default_factory=list)
    most_alive: int = 0

    def load(self, entry: GraphEntry) -> MockRunner:
        self.alive.append(entry.shape.role)
        self.most_alive = max(self.most_alive, len(self.alive))
        return MockRunner(self, entry)


class MockRunner:
    def __init__(self, mock: Mock, entry: GraphEntry) -> None:
        self.mock, self.entry = mock, entry

    def __del__(self) -> None:
        self.mock.alive.remove(self.entry.shape.role)

    def bind(self, arrays: Mapping[str, np.ndarray]) -> Callable[[], None]:
        self.mock.binds += 1
        for port in (*self.entry.inputs, *self.entry.outputs):
            assert arrays[port.name].shape == port.shape, port.name
        return lambda: self.run(arrays)

    def run(self, arrays: Mapping[str, np.ndarray]) -> None:
        rows = self.entry.shape.batch
        new = arrays["prompt_length"] if "prompt_length" in arrays else np.ones(rows, np.int64)
        past = arrays["past_length"] if "past_length" in arrays else np.zeros(rows, np.int64)
        assert (new >= 1).all()
        self.mock.calls.append((self.entry.shape.role, past.tolist(), new.tolist()))
        for kind, factor in (("key", 1.0), ("value", 2.0)):
            # NaN in the slots that hold nothing: reading one of them gives a token that is no number
            held = np.full(arrays[f"present.0.{kind}"].shape, np.nan, np.float32)
            for row in range(rows):
                if past[row]:
                    held[row, 0, : past[row]] = arrays[f"past_key_values.0.{kind}"][row, 0, : past[row]]
                ids = arrays["input_ids"][row, : new[row]]
                assert past[row] + new[row] <= held.shape[2], "written past the last slot"
                held[row, 0, past[row] : past[row] + new[row], 0] = factor * ids
            arrays[f"present.0.{kind}"][:] = held
        for row in range(rows):
            filled = slice(0, past[row] + new[row])
            ids = arrays["present.0.value"][row, 0, filled, 0] - arrays["present.0.key"][row, 0, filled, 0]
            target = next_token([int(token) for token in ids], self.mock.vocab)
            arrays["logits"][row, 0] = -np.abs(np.arange(self.mock.vocab) - target) - 2


def manifest(graphs: dict[str, GraphEntry], vocab: int, stop: Sequence[int] = (), **changes: Any) -> Manifest:
    weights = Weights(
        file=File(path="weights.data", nbytes=4, sha256=hashlib.sha256(b"\0" * 4).hexdigest()),
        tensors={"w": WeightTensor(offset=0, nbytes=4, dtype="FLOAT", shape=(1,), sources=("w",), bits=32)},
    )
    values = {
        "source": CheckpointSource(id="mock", model_type="mock", checkpoint_sha256="0" * 64),
        "model": spec(vocab),
        "target": "portable",
        "precision": "fp32",
        "tools": {},
        "graphs": graphs,
        "weights": weights,
        "calling": Calling(tokens=Tokens(bos=None, stop=tuple(stop)), prompt=None),
        "files": (),
    }
    return Manifest(**(values | changes))


@pytest.fixture
def greedy() -> Callable[[Sequence[int], int, int], list[int]]:
    """(prompt, count, vocab): the mock model's next `count` tokens."""
    return greedy_tokens


@pytest.fixture
def engine_of(tmp_path: Path) -> Callable[..., tuple[Engine, Mock]]:
    """An engine over the mock model and what it recorded."""

    def make(
        max_len: int = 4,
        ctx: int = 16,
        batch: int = 1,
        continues: bool = True,
        in_place: bool = False,
        one_at_a_time: bool = False,
        vocab: int = 11,
        stop: Sequence[int] = (),
        text: Any = None,
    ) -> tuple[Engine, Mock]:
        mock = Mock(vocab)
        shape = GraphShape(role="prefill", batch=batch, max_len=max_len, ctx=ctx if continues else None)
        prefill = entry(shape, vocab, in_place)
        decode = entry(GraphShape(role="decode", batch=batch, max_len=1, ctx=ctx), vocab, in_place)
        pair = GraphPair(prefill, decode, spec(vocab).layers, mock.load, one_at_a_time)
        graphs = {graph.shape.name: graph for graph in (prefill, decode)}
        return Engine(manifest(graphs, vocab, stop), pair, text, tmp_path), mock

    return make


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of single bytes after the special tokens: 261 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Path]:
    """A bundle of the mock model as ONNX graphs, with a tokenizer of bytes."""
    from tests.onnx_mock import onnx_mock  # which needs onnx

    def make(
        max_len: int = 8,
        ctx: int = 64,
        batch: int = 1,
        continues: bool = True,
        roles: Sequence[str] = ("prefill", "decode"),
        decode_ctx: int | None = None,
        ballast_mb: int = 0,
    ) -> Path:
        bundle, vocab = tmp_path / "bundle", len(SPECIAL) + 256
        bundle.mkdir()
        (bundle / "weights.data").write_bytes(b"\0" * 4)
        tiny_tokenizer().save(str(bundle / "tokenizer.json"))
        config = {"bos_token": "<bos>", "eos_token": "<eos>"}
        (bundle / "tokenizer_config.json").write_text(json.dumps(config))
        (bundle / "chat_template.jinja").write_text(CHAT)
        shapes = {
            "prefill": GraphShape(
                role="prefill", batch=batch, max_len=max_len, ctx=ctx if continues else None
            ),
            "decode": GraphShape(role="decode", batch=batch, max_len=1, ctx=decode_ctx or ctx),
        }
        graphs = {}
        for role in roles:
            data = onnx_mock(shapes[role], vocab, ballast_mb if role == "prefill" else 0)
            file = File(path=f"{role}.onnx", nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
            (bundle / file.path).write_bytes(data)
            graphs[role] = entry(shapes[role], vocab, file=file)
        text = manifest(graphs, vocab, stop=[1]).to_json()
        (bundle / "manifest.json").write_text(text)
        return bundle

    return make
