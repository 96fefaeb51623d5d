"""Checkpoints in the styles that people publish: the export reads of each what transformers loads from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillgraph.errors import CheckFailed
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]
Refused = Callable[..., AbstractContextManager[None]]
FAMILIES = ["gemma3", "gemma3_vision", "llama", "llava", "qwen2"]
TEXT = ["gemma3", "llama", "qwen2"]
HEAD = "lm_head.weight"


@pytest.fixture
def publish(tiny_checkpoint: Any, tmp_path: Path) -> Callable[..., Path]:
    """`publish(edit, family="llama", tied=True, **config)`: a checkpoint whose tensors `edit` has changed."""

    def make(
        edit: Callable[[Tensors], object], family: str = "llama", tied: bool = True, **config: Any
    ) -> Path:
        made = tiny_checkpoint(family=family, tie_word_embeddings=tied, **config)
        folder = Path(shutil.copytree(made, tmp_path / f"{family}-{tied}"))
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def embedding_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


def own_head(tensors: Tensors) -> None:
    table = tensors[embedding_of(tensors)]
    tensors[HEAD] = torch.randn(table.shape, generator=torch.manual_seed(9)) / 8


def head_alone(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(embedding_of(tensors))


def both_the_same(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[embedding_of(tensors)].clone()


def base_names(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def old_frequencies(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def old_positions(tensors: Tensors) -> None:
    name = next(name for name in tensors if name.endswith("embeddings.patch_embedding.weight"))
    tensors[name.replace("patch_embedding.weight", "position_ids")] = torch.arange(4)[None]


def assert_read_as_by_transformers(folder: Path, original: Callable[[str], Any]) -> Checkpoint:
    """The export's model, filled with what the export reads, has the weights that transformers loads."""
    checkpoint = open_checkpoint(str(folder))
    ours = checkpoint.build("eager")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(checkpoint.tensor(name))
    expected = dict(original(str(folder)).named_parameters(remove_duplicate=False))
    found = dict(ours.named_parameters(remove_duplicate=False))
    assert set(found) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_in_a_tied_file_is_the_head(publish: Any, original: Any, family: str) -> None:
    checkpoint = assert_read_as_by_transformers(publish(own_head, family), original)
    assert checkpoint.tied is None
    assert HEAD in checkpoint.tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", [head_alone, both_the_same])
def test_a_tied_pair_stays_one_tensor(publish: Any, original: Any, family: str, edit: Any) -> None:
    checkpoint = assert_read_as_by_transformers(publish(edit, family), original)
    assert checkpoint.tied is not None
    assert HEAD not in checkpoint.tensors


@pytest.mark.parametrize("family", TEXT)
def test_names_without_the_prefix_of_the_base_model(publish: Any, original: Any, family: str) -> None:
    assert_read_as_by_transformers(publish(base_names, family), original)


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("llama", old_frequencies),
        ("qwen2", old_frequencies),
        ("gemma3_vision", old_positions),
        ("llava", old_positions),
    ],
)
def test_what_transformers_ignores_is_ignored(publish: Any, original: Any, family: str, edit: Edit) -> None:
    assert_read_as_by_transformers(publish(edit, family), original)


def test_what_transformers_does_not_ignore_is_refused(publish: Any, refused: Refused) -> None:
    folder = publish(lambda tensors: tensors.update({"model.layers.0.mlp.gate": torch.ones(2)}))
    with refused("read checkpoint", "unknown tensor model.layers.0.mlp.gate"):
        open_checkpoint(str(folder))


def test_two_tensors_for_one_are_refused(publish: Any, refused: Refused) -> None:
    folder = publish(lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"].clone()}))
    with refused("read checkpoint", "norm.weight", "model.norm.weight", "remove one"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("family", ["gemma3", "gemma3_vision", "llama"])
def test_a_bundle_of_a_file_with_its_own_head_gives_its_logits(
    publish: Any, tmp_path: Path, original: Any, family: str
) -> None:
    """The bundle's tokens are transformers', where once 0 of 20 were right and validation was green."""
    import numpy as np

    from stillgraph.exporter.bundle.build import export
    from stillgraph.exporter.config import ExportConfig, decode_shape, prefill_shape

    folder = publish(own_head, family)
    config = ExportConfig(model=str(folder), out=tmp_path / "bundle")
    export(config, [prefill_shape(config, 16, 40), decode_shape(config, 40)], True, lambda line: None, None)
    from stillgraph.loading import load

    ids = [7, 3, 11, 200, 5]
    with torch.no_grad():
        logits = original(str(folder))(torch.tensor([ids])).logits[0, -1]
    (step,) = load(str(tmp_path / "bundle")).stream(ids, max_new_tokens=1)
    assert step.token == int(logits.argmax())
    expected = float(torch.log_softmax(logits.double(), -1)[step.token])
    np.testing.assert_allclose(step.logprob, expected, rtol=0, atol=1e-5)


MUTATIONS: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "bf16": lambda name, tensor: tensor.bfloat16(),
    "transposed": lambda name, tensor: (
        tensor.T if tensor.dim() == 2 and len(set(tensor.shape)) == 1 else tensor
    ),
    "scaled": lambda name, tensor: tensor * 1.0001 if "norm" in name else tensor,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_reading_that_is_not_transformers_is_caught(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family="llama", hidden_size=96)))
    read, change = Checkpoint.tensor, MUTATIONS[mutation]
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: change(name, read(self, name)))
    with pytest.raises(CheckFailed, match="read otherwise than by transformers"):
        checkpoint.load()


def test_the_reference_is_transformers_own(tiny_checkpoint: Any, original: Any) -> None:
    folder = str(tiny_checkpoint())
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(open_checkpoint(folder).load()(ids).logits, original(folder)(ids).logits)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", ("GGUF", "name the file itself")),
        ("pytorch_model.bin", ("pickled", "save_pretrained")),
        ("consolidated.00.pth", ("pickled", "save_pretrained")),
        ("adapter_model.safetensors", ("adapter", "merge_and_unload")),
    ],
)
def test_other_formats_are_named(
    tiny_checkpoint: Any, tmp_path: Path, refused: Refused, name: str, words: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "own"))
    (folder / "model.safetensors").rename(folder / name)
    with refused("read checkpoint", name, *words):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("family", ["llama", "gemma3_vision"])
def test_a_quantized_checkpoint_is_named(publish: Any, refused: Refused, family: str) -> None:
    folder = publish(lambda tensors: None, family, quantization_config={"quant_method": "gptq", "bits": 4})
    with refused("read checkpoint", "quantization_config, gptq", "original checkpoint"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("asked", ["kernels-community/flash-attn2", "flash_attention_2"])
def test_a_config_that_asks_for_a_kernel(publish: Any, original: Any, asked: str) -> None:
    folder = publish(lambda tensors: None)
    raw = json.loads((folder / "config.json").read_text()) | {"_attn_implementation": asked}
    (folder / "config.json").write_text(json.dumps(raw))
    assert_read_as_by_transformers(folder, original)
