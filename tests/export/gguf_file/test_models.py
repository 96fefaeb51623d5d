"""GGUF files of tiny checkpoints: the model that they were written from comes back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import stillgraph
from stillgraph.errors import CheckFailed
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.gguf_file import tensors
from stillgraph.exporter.gguf_file.header import read_header
from stillgraph.exporter.gguf_file.model_config import config_of, llama3_scaling
from stillgraph.manifest import read
from tests.gguf_writer import divisors, write_bare, write_gguf

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
SIZES = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " max_position_embeddings rms_norm_eps"
).split()
PLAIN = {"attention_bias": None, "use_sliding_window": None, "sliding_window": None, "layer_types": None}
# Of each architecture what is its own: scaled RoPE, an untied head, biases, caps, windows, an odd epsilon.
MODELS = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "rms_norm_eps": 3e-4, "head_dim": 32},
    "qwen2": PLAIN | {"head_dim": None, "intermediate_size": 96},
    "qwen3": PLAIN,
    "gemma2": {"query_pre_attn_scalar": 24, "hidden_size": 48, "attention_bias": None},
    "gemma3": {"query_pre_attn_scalar": 24, "rope_parameters": LINEAR},
}


@pytest.fixture
def written(tiny_checkpoint, tmp_path):
    """`written(family, kind=None, **keys)`: a folder, and the GGUF of it."""

    def make(family: str, kind: gguf.GGMLQuantizationType | None = None, **keys: object) -> tuple[Path, Path]:
        folder = tiny_checkpoint(family=family, **MODELS[family])
        return folder, write_gguf(folder, tmp_path / "model.gguf", kind, **keys)

    return make


@pytest.mark.parametrize("family", MODELS)
def test_the_model_comes_back(written, original, family: str) -> None:
    """To the bit, but for norms: 1 is added to Gemma's and taken away again. And what transformers reads
    of the config is what is read here."""
    folder, path = written(family)
    checkpoint = open_checkpoint(str(path))
    config = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    for name in SIZES:
        assert getattr(checkpoint.config, name) == pytest.approx(config.get(name), rel=1e-6), name
    ids = torch.randint(0, 260, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = checkpoint.load()(ids).logits, original(str(folder))(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if "gemma" in family else 0)


def test_a_quantized_one_is_read_as_gguf_reads_it(written) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    folder, path = written("qwen2", kind)
    name = "model.embed_tokens.weight"
    raw = open_checkpoint(str(folder)).tensor(name).numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(raw, kind), kind)
    found = open_checkpoint(str(path)).tensor(name).numpy()
    np.testing.assert_array_equal(found, expected)
    assert 0 < np.abs(found - raw).max() < np.abs(raw).max() / 127


@pytest.mark.parametrize(("family", "undone"), [("llama", "heads"), ("gemma3", "shifted")])
def test_a_tensor_that_is_read_otherwise_than_by_transformers_is_seen(
    written, monkeypatch, family: str, undone: str
) -> None:
    _, path = written(family)
    real = tensors.GgufTensor

    def undo(path, info, heads, shifted):
        return real(path, info, **{"heads": heads, "shifted": shifted} | {undone: None})

    monkeypatch.setattr(tensors, "GgufTensor", undo)
    with pytest.raises(CheckFailed, match="otherwise than by transformers"):
        open_checkpoint(str(path)).load()


def test_a_bundle_of_one_is_made_and_proven(written, tmp_path, original) -> None:
    """With the tokens, the template and the end of a turn that the file alone has."""
    folder, path = written("llama", tokenizer__ggml__eot_token_id=5)
    place = stillgraph.export(path, tmp_path / "out", max_len=8, ctx=24)
    manifest = read(place)
    assert manifest.validation is not None
    assert manifest.validation.passed
    assert manifest.source.id == str(path)
    assert manifest.calling.tokens.stop == (1, 5)
    assert manifest.calling.tokens.tokenizer_adds_bos
    assert (place / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12 \u00e9").ids
    step = next(stillgraph.load(place).stream("12 \u00e9", max_new_tokens=1))
    with torch.no_grad():
        logprobs = original(str(folder))(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert step.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert step.token == int(logprobs.argmax())


def test_the_folder_of_small_files_goes_with_the_checkpoint(written) -> None:
    _, path = written("llama")
    checkpoint = open_checkpoint(str(path))
    folder = checkpoint.folder
    assert (folder / "tokenizer.json").is_file()
    del checkpoint
    assert not folder.exists()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_known_by_its_divisors(factor: float) -> None:
    rope = LLAMA3 | {"factor": factor}
    assert llama3_scaling(divisors(rope, 64), 500_000.0, 64) == {
        name: value for name, value in rope.items() if name != "rope_theta"
    }


@pytest.mark.parametrize("change", [{"low_freq_factor": 2.0}, {"original_max_position_embeddings": 4096}])
def test_other_scalings_are_not_taken_for_it(change: dict[str, float]) -> None:
    assert llama3_scaling(divisors(LLAMA3 | change, 64), 500_000.0, 64) is None


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "m.gguf", **{"llama.rope.scaling.factor": 4.0})
    rope = config_of(read_header(path))["rope_parameters"]
    assert rope == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}


@pytest.mark.parametrize(("layers", "scale"), [(2, 24), (62, 168)])
def test_the_queries_of_the_largest_gemma_are_scaled_otherwise(
    tmp_path: Path, layers: int, scale: int
) -> None:
    """As in llama.cpp's models/gemma3.cpp: 5376 / 32 in place of the size of a head."""
    sizes = {
        "context_length": 64, "embedding_length": 5376, "block_count": layers, "feed_forward_length": 8,
        "attention.head_count": 32, "attention.key_length": 24, "attention.sliding_window": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    keys = {f"gemma3.{name}": value for name, value in sizes.items()}
    table = {f"blk.{layer}.attn_q.weight": (np.zeros((1, 1), np.float32), None) for layer in range(layers)}
    made = config_of(read_header(write_bare(tmp_path / "m.gguf", "gemma3", table, **keys)))
    assert made["query_pre_attn_scalar"] == scale
    full = [layer for layer, kind in enumerate(made["layer_types"]) if kind == "full_attention"]
    assert full == list(range(5, layers, 6))
