"""Every patch proves itself: the same numbers with and without."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from stillgraph.patches.fused_attention import fused_attention
from stillgraph.patches.fused_mlp import fused_mlp
from stillgraph.patches.half_weights import half_embedding, half_linear
from stillgraph.patches.patch import Patch, applied
from stillgraph.patches.rms_norm import rms_norm
from stillgraph.patches.rms_normalization import rms_normalization
from stillgraph.patches.tied_embedding import tied_embedding

SUMS = 1e-5  # relative to the largest output: products of 48 and 96 terms, summed in another order
HALF = 2.0**-11  # relative rounding of a number to fp16


def with_and_without(patch: Patch, module: nn.Module, argument: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        plain = module(argument)
        with applied((patch,)):
            return module(argument), plain


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def embedding() -> nn.Module:
    return seeded(Gemma3TextScaledWordEmbedding(40, 24, 0, embed_scale=24**0.5))


IDS = torch.tensor([[0, 39, 7], [7, 7, 1]])
RMS_NORM = rms_norm(Gemma3RMSNorm, shifted=True)
HALF_EMBEDDINGS = [half_embedding(nn.Embedding, tied) for tied in (False, True)]
UNSHIFTED = (llama.LlamaRMSNorm, qwen2.Qwen2RMSNorm)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
def test_rms_norm(scale: float) -> None:
    """At 1e-4 the epsilon of the root decides, at 3e3 (Gemma's residuals) it does not."""
    argument = scale * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    found, plain = with_and_without(RMS_NORM, seeded(Gemma3RMSNorm(48)), argument)
    # x / sqrt(m) for x * rsqrt(m): a few roundings of fp32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("owner", UNSHIFTED)
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_rms_norms_that_scale_by_the_weight_itself(owner: type, scale: float) -> None:
    argument = scale * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    module = seeded(owner(48))
    found, plain = with_and_without(rms_norm(owner), module, argument)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-9)
    onnx = as_onnx(rms_normalization(owner), module.eval(), argument)
    torch.testing.assert_close(onnx, plain, rtol=1e-6, atol=1e-9)


def test_plain_embeddings() -> None:
    """Without a scale: exact where tied, rounded to fp16 where halved."""
    module = seeded(nn.Embedding(40, 24))
    found, plain = with_and_without(tied_embedding(nn.Embedding), module, IDS)
    assert torch.equal(found, plain)
    for patch in HALF_EMBEDDINGS:
        found, plain = with_and_without(patch, module, IDS)
        assert found.dtype == torch.float32
        assert torch.equal(found, module.weight[IDS].half().float())
        assert not torch.equal(found, plain)


def test_rms_norm_keeps_the_dtype() -> None:
    found, plain = with_and_without(
        RMS_NORM, seeded(Gemma3RMSNorm(8)), torch.ones(1, 8, dtype=torch.bfloat16)
    )
    assert found.dtype == plain.dtype == torch.bfloat16


def test_tied_embedding_is_exact() -> None:
    found, plain = with_and_without(tied_embedding(nn.Embedding), embedding(), IDS)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("patch", HALF_EMBEDDINGS, ids=lambda patch: patch.name)
def test_half_embedding_rounds_the_table_alone(patch: Patch) -> None:
    module = embedding()
    found, plain = with_and_without(patch, module, IDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=HALF, atol=0.0)
    assert not torch.equal(found, plain)
    rows = module.weight[IDS].half().float() * module.embed_scale
    assert torch.equal(found, rows)


@pytest.mark.parametrize("bias", [True, False])
def test_half_linear(bias: bool) -> None:
    module = seeded(nn.Linear(48, 16, bias=bias))
    argument = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    found, plain = with_and_without(half_linear(nn.Linear), module, argument)
    assert found.dtype == torch.float32
    # Input and matrix round once each, and the product: three half roundings of the sum of magnitudes.
    room = 3 * HALF * (argument.abs() @ module.weight.abs().t() + 1.0)
    assert ((found - plain).abs() <= room).all()
    assert not torch.equal(found, plain)


def as_onnx(patch: Patch, module: nn.Module, argument: Tensor) -> Tensor:
    """What ONNX Runtime makes of a module traced with a patch, whose ops PyTorch cannot run."""
    with torch.no_grad(), applied((patch,)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (argument,), dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: argument.numpy()})[0])


def assert_near(found: Tensor, plain: Tensor) -> None:
    assert float((found - plain).abs().max()) <= SUMS * float(plain.abs().max())


@pytest.mark.parametrize("scale", [1e-4, 3e3])
def test_rms_normalization(scale: float) -> None:
    module = seeded(Gemma3RMSNorm(48, eps=1e-6)).eval()
    argument = scale * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = module(argument)
    patch = rms_normalization(Gemma3RMSNorm, shifted=True)
    torch.testing.assert_close(as_onnx(patch, module, argument), plain, rtol=1e-6, atol=1e-9)


def geometry(**values: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
    return gemma3.Gemma3TextConfig(
        **sizes, num_hidden_layers=2, head_dim=16, attn_implementation="eager", **values
    )


def test_fused_mlp() -> None:
    argument = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    found, plain = with_and_without(
        fused_mlp(gemma3.Gemma3MLP), seeded(gemma3.Gemma3MLP(geometry())), argument
    )
    assert_near(found, plain)


@pytest.mark.parametrize("bias", [True, False])
def test_fused_mlp_of_llama_and_qwen2(bias: bool) -> None:
    argument = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 3}
    of_llama = seeded(llama.LlamaMLP(llama.LlamaConfig(**sizes, mlp_bias=bias)))
    of_qwen2 = seeded(qwen2.Qwen2MLP(qwen2.Qwen2Config(**sizes)))
    for module in (of_llama, of_qwen2):
        assert_near(*with_and_without(fused_mlp(type(module)), module, argument))


class StandIn:
    """A cache that attends in PyTorch, from nothing, to [B, S, heads * D] queries, keys and values."""

    def __init__(self, rotary: tuple[Tensor, Tensor], mask: Tensor) -> None:
        self.rotary, self.mask = rotary, mask

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, module: Any, softcap: None, rope: Literal[True]
    ) -> Tensor:
        heads = [t.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for t in (query, key, value)]
        query, key = gemma3.apply_rotary_pos_emb(heads[0], heads[1], *self.rotary)
        output, _ = gemma3.eager_attention_forward(
            module, query, key, heads[2], self.mask, scaling=module.scaling
        )
        return output.flatten(2)


class Attention(nn.Module):
    """Gemma3Attention over 5 tokens from nothing; `cache` is for the patched one."""

    def __init__(self, bias: bool, cached: bool) -> None:
        super().__init__()
        config = geometry(attention_bias=bias)
        self.attention = seeded(gemma3.Gemma3Attention(config, 1)).eval()
        positions = torch.arange(5)[None]
        kind = config.layer_types[1]
        self.rotary = gemma3.Gemma3RotaryEmbedding(config)(torch.zeros(1), positions, kind)
        self.mask = torch.full((5, 5), -1e9).triu(1)[None, None]
        self.cache = StandIn(self.rotary, self.mask) if cached else None

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.attention(
            hidden, self.rotary, None if self.cache else self.mask, past_key_values=self.cache
        )[0]
        return output


@pytest.mark.parametrize("bias", [True, False])
def test_fused_attention(bias: bool) -> None:
    """6 query heads over 3; what the op does between the projections is PyTorch's in both."""
    argument = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        plain = Attention(bias, cached=False)(argument)
    patch = fused_attention(gemma3.Gemma3Attention, shifted=True)
    assert_near(as_onnx(patch, Attention(bias, cached=True), argument), plain)
