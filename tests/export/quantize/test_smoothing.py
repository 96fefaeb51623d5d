"""Smoothed weights: the same model for transformers, channels of like size, and a bundle that says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from stillgraph.errors import CheckFailed
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.config import decode_shape, prefill_shape, request
from stillgraph.exporter.quantize.smoothing import smoothings
from stillgraph.exporter.smoothing import Smoothing, shipped_smoothings, smooth
from stillgraph.exporter.validate.fake_quantize import smooth_unchanged
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read
from tests.conftest import FAMILIES

IDS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(0))
MLP = ("mlp.gate_proj", "mlp.up_proj")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SEPARATE = {
    "input_layernorm": ATTENTION,
    "post_attention_layernorm": MLP,
    "mlp.up_proj": ("mlp.down_proj",),
}
# What reads what in a layer: transformers' modeling files, read by hand.
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": SEPARATE,
    "qwen2": SEPARATE,
    "llava": SEPARATE,
    "gemma3": {
        "input_layernorm": ATTENTION,
        "pre_feedforward_layernorm": MLP,
        "mlp.up_proj": ("mlp.down_proj",),
    },
    "olmo2": {"mlp.up_proj": ("mlp.down_proj",)},  # its norms are behind attention and MLP
    "phi3": {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    "smollm3": {key: found for key, found in SEPARATE.items() if "up_proj" not in key},  # up has a bias
}


def quietly(line: str) -> None:
    pass


def found_in(folder: Path) -> tuple[Checkpoint, tuple[Smoothing, ...]]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, smoothings(checkpoint, IDS, quietly)


def stirred(found: tuple[Smoothing, ...]) -> list[Smoothing]:
    """Exponents of all sizes, where those of tiny models are small."""
    generator = torch.Generator().manual_seed(1)

    def some(one: Smoothing) -> torch.Tensor:
        return torch.randint(-3, 4, one.exponents.shape, generator=generator, dtype=torch.int8)

    return [replace(one, exponents=some(one)) for one in found]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", READERS)
def test_what_reads_what_is_seen(tiny_checkpoint: Any, family: str) -> None:
    _, found = found_in(tiny_checkpoint(family=family))
    layer = {
        tuple(name.partition("layers.1.")[2].removesuffix(".weight") for name in one.sources)
        for one in found
        if "layers.1." in one.sources[0]
    }
    assert layer == {(maker, *readers) for maker, readers in READERS[family].items()}
    heads = [one for one in found if "layers." not in one.sources[0]]
    assert len(heads) == 1, "what scores the vocabulary reads the last norm"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_same(tiny_checkpoint: Any, family: str) -> None:
    checkpoint, found = found_in(tiny_checkpoint(family=family))
    model = checkpoint.load()
    before = logits(model)
    assert found
    smooth(model, checkpoint.tied, stirred(found))
    if any(one.offset for one in found):
        assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    else:
        assert torch.equal(logits(model), before), "powers of two round nothing"


@pytest.fixture(scope="module")
def uneven(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose products get a few large inputs, as real ones do, that their weights make up for."""
    folder = tmp_path_factory.mktemp("uneven") / "tiny"
    shutil.copytree(tiny_checkpoint(family="llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        for maker, readers in SEPARATE.items():
            tensors[f"model.layers.{layer}.{maker}.weight"][::9] *= 50
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, ::9] /= 50
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_each_channel_is_near_the_others(uneven: Path) -> None:
    """Inputs over weights of a product are all alike but for a factor of 2: exponents are whole numbers."""
    checkpoint, found = found_in(uneven)
    model = checkpoint.load()
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    kept: list[torch.Tensor] = []
    down.register_forward_pre_hook(lambda module, x: kept.append(x[0].flatten(0, 1)))

    def ratios() -> torch.Tensor:
        kept.clear()
        logits(model)
        found: torch.Tensor = (kept[0].square().mean(0).sqrt() / down.weight.abs().amax(0)).log2()
        return found - found.mean()

    assert ratios().abs().max() > 8
    smooth(model, checkpoint.tied, found)
    assert ratios().abs().max() < 1.2


def test_a_missing_reader_is_found(tiny_checkpoint: Any) -> None:
    checkpoint, found = found_in(tiny_checkpoint(family="gemma3"))
    smooth_unchanged(checkpoint.load(), checkpoint.tied, found, IDS.numpy())
    for one in stirred(found):
        wrong = replace(one, sources=one.sources[:-1])
        with pytest.raises(CheckFailed, match="smoothed weights give another model"):
            smooth_unchanged(checkpoint.load(), checkpoint.tied, [wrong], IDS.numpy())


def test_a_norm_that_something_else_reads_leaves_all_as_it_was(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama as llama

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        plain: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return plain + x

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    _, found = found_in(tiny_checkpoint(family="llama"))
    assert found == ()


def test_rounded_inputs_cost_less(uneven: Path) -> None:
    checkpoint, found = found_in(uneven)

    def cost(smoothed: tuple[Smoothing, ...]) -> float:
        model = checkpoint.load()
        exact = logits(model).double().log_softmax(-1)
        smooth(model, checkpoint.tied, smoothed)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, x: rounded(x[0]))
        off = logits(model).double().log_softmax(-1)
        return float((exact.exp() * (exact - off)).sum(-1).mean())

    assert cost(found) < 0.2 * cost(())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """In 4 bits, blocks of 32: 8 of these small models' inputs cost next to nothing."""
    blocks = functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7
    return ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_a_bundle_is_proven_and_added_to(
    tiny_checkpoint: Any, tmp_path: Path, family: str, target: str
) -> None:
    """gemma3 has its embedding in its head, qwen3 a head of its own."""
    folder = str(tiny_checkpoint(family=family))
    values = {"model": folder, "target": target, "precision": "int8", "batch": 1, "block_size": 32}
    config = request(**values, calibrate="samples", out=tmp_path / "bundle")
    export(config, [decode_shape(config, 24)], replace=True, say=quietly)
    found = shipped_smoothings(config.place, read(config.place))
    assert len(found) == 2 * 3 + 1
    # Later, with or without texts: what is there is smoothed, so what is added must be.
    later = config.model_copy(update={"calibrate": "none"})
    export(later, [prefill_shape(config, 8, 24)], replace=False, say=quietly)
    again = shipped_smoothings(config.place, read(config.place))
    for one, other in zip(found, again, strict=True):
        assert one.sources == other.sources
        np.testing.assert_array_equal(one.exponents, other.exponents)
    parity = validate(config.place, depth="default", say=quietly)
    assert parity.passed
    assert max(c.worst.relative_error for c in parity.cases if not c.optimized) < 1e-5


def test_without_texts_nothing_is_smoothed(tiny_checkpoint: Any, tmp_path: Path) -> None:
    values = {"model": str(tiny_checkpoint()), "target": "portable", "precision": "int8", "batch": 1}
    config = request(**values, calibrate="none", out=tmp_path / "bundle")
    export(config, [decode_shape(config, 24)], replace=True, say=quietly)
    assert not shipped_smoothings(config.place, read(config.place))
