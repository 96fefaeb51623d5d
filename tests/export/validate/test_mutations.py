"""A loader that is wrong in one of ten ways: the files that it ships do not pass, and it is seen where."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stillgraph.errors import CheckFailed
from stillgraph.exporter.bundle import build
from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.config import request
from stillgraph.exporter.tensor_files import SafeTensor
from stillgraph.exporter.validate import validate as validation
from stillgraph.spec import GraphShape

Read = Callable[[str], torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.1"
SQUARE = f"{LAYER}.self_attn.k_proj.weight"  # 2 heads of 24 by 48
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


def silent(_: str) -> None:
    """No progress."""


def right(read: Read, name: str) -> torch.Tensor:
    return read(name)


def dropped(read: Read, name: str) -> torch.Tensor:
    return torch.zeros_like(read(name)) if name == DOWN else read(name)


def tied(read: Read, name: str) -> torch.Tensor:
    return read(EMBEDDING if name == HEAD else name)


def swapped(read: Read, name: str) -> torch.Tensor:
    return read({GATE: UP, UP: GATE}.get(name, name))


def transposed(read: Read, name: str) -> torch.Tensor:
    return read(name).T if name == SQUARE else read(name)


def in_bf16(read: Read, name: str) -> torch.Tensor:
    return read(name).to(torch.bfloat16).to(torch.float32)


def without_a_norm(model: Any) -> None:
    model.model.layers[1].post_attention_layernorm = torch.nn.Identity()


def with_another_scale(model: Any) -> None:
    """Of heads of hidden_size / heads, which these are not."""
    for layer in model.model.layers:
        layer.self_attn.scaling = (model.config.hidden_size / model.config.num_attention_heads) ** -0.5


def with_another_epsilon(model: Any) -> None:
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    assert {norm.variance_epsilon for norm in norms} == {1e-6}
    for norm in norms:
        norm.variance_epsilon = 1e-5


def with_another_base(config: Any) -> None:
    assert config.rope_parameters["rope_theta"] == 10_000.0
    config.rope_parameters["rope_theta"] = 500_000.0


READINGS = {
    "none": right,
    "drop": dropped,
    "tie": tied,
    "swap": swapped,
    "transpose": transposed,
    "bf16": in_bf16,
}
MODELS = {"norm": without_a_norm, "epsilon": with_another_epsilon, "scale": with_another_scale}


class Loader:
    """Exports a prefill as a loader with one mistake would."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def export(self, out: Path, patch: pytest.MonkeyPatch, name: str) -> Path:
        if name in READINGS:
            patch.setattr(Checkpoint, "tensor", reading(name))
        elif name in MODELS:
            patch.setattr(Checkpoint, "build", building(name))
        else:
            opens = {"base": self.with_another_base, "untie": self.untied}
            patch.setattr(build, "open_checkpoint", opens[name])
        values = {"model": str(self.checkpoint), "target": "portable", "precision": "fp32", "batch": 1}
        shape = GraphShape(role="prefill", max_len=8)
        build.export(request(**values, out=out), [shape], replace=True, say=silent)
        return out

    def with_another_base(self, model: str) -> Checkpoint:
        found = open_checkpoint(model)
        config = deepcopy(found.config)
        with_another_base(config)
        return replace(found, config=config)

    def untied(self, model: str) -> Checkpoint:
        """A head of its own, of what another tensor of its shape has."""
        found = open_checkpoint(model)
        assert found.tied == EMBEDDING
        config = deepcopy(found.config)
        config.tie_word_embeddings = False

        class Made(SafeTensor):
            def read(self) -> torch.Tensor:
                return torch.randn(super().read().shape, generator=torch.manual_seed(1)) / 8

        own = found.tensors[EMBEDDING]
        return replace(
            found, config=config, tied=None, tensors=found.tensors | {HEAD: Made(own.path, own.name)}
        )


def reading(name: str) -> Callable[[Checkpoint, str], torch.Tensor]:
    """`Checkpoint.tensor` with a mistake."""
    plain = Checkpoint.tensor
    return lambda checkpoint, tensor: READINGS[name](lambda other: plain(checkpoint, other), tensor)


def building(name: str) -> Callable[[Checkpoint, str], Any]:
    """`Checkpoint.build` with a mistake in the model that is traced."""
    plain = Checkpoint.build

    def build_model(checkpoint: Checkpoint, attention: str) -> Any:
        model = plain(checkpoint, attention)
        MODELS[name](model)
        return model

    return build_model


@pytest.fixture(scope="module")
def own_head(tiny_checkpoint: Callable[..., Path]) -> Loader:
    return Loader(tiny_checkpoint(family="llama", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def one_table(tiny_checkpoint: Callable[..., Path]) -> Loader:
    return Loader(tiny_checkpoint(family="llama"))


# What is wrong first: the layer whose keys or values are, or the logits alone.
FIRST = {"none": None, "drop": "logits", "tie": "logits", "untie": "logits", "swap": "logits", "transpose": 1,
         "bf16": 0, "norm": "logits", "epsilon": 0, "base": 0, "scale": 1}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.fresh_traces] * (n in MODELS)) for n in FIRST]
)
def test_a_wrong_loader_is_caught(
    own_head: Loader, one_table: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    loader = one_table if name == "untie" else own_head
    with pytest.MonkeyPatch.context() as patch:
        bundle = loader.export(tmp_path / "bundle", patch, name)
    monkeypatch.setattr(validation, "write_page", lambda *_: "")  # a third of the time
    parity = validation.validate(bundle, depth="quick", say=silent)
    layers = [check.layer for _, check in parity.broken if check.layer is not None]
    first = min(layers) if layers else "logits" if parity.broken else None
    assert first == FIRST[name], parity.problem()
    assert parity.passed == (name == "none")


@pytest.mark.parametrize("name", sorted(READINGS.keys() - {"none"}))
def test_a_wrong_reading_is_caught_before_any_graph_is_run(
    own_head: Loader, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    checkpoint = open_checkpoint(str(own_head.checkpoint))
    checkpoint.load()
    monkeypatch.setattr(Checkpoint, "tensor", reading(name))
    with pytest.raises(CheckFailed, match="is read otherwise than by transformers"):
        checkpoint.load()
