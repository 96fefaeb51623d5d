"""Patches that Phi 3 alone needs of their kind: one weight for q, k and v, and RoPE that a length changes."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.phi3 import modeling_phi3 as phi3

from stillgraph.patches.fixed_rotary import fixed_rotary
from stillgraph.patches.fused_attention import fused_attention
from stillgraph.patches.patch import applied
from tests.patches.test_patches import StandIn, assert_near, seeded

SHORT = 16  # positions that the short factor is for
CONFIG = phi3.Phi3Config(
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    original_max_position_embeddings=SHORT,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.2, 1.4, 1.6],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": SHORT,
    },
    attn_implementation="eager",
    pad_token_id=0,
)


def rotary_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, count, 8]."""
    return phi3.Phi3RotaryEmbedding(CONFIG)(torch.zeros(1), torch.arange(count)[None])


def test_one_weight_is_split_where_queries_keys_and_values_end() -> None:
    """6 heads over 2. The bias, which no published one has, tells each of them apart."""
    module = seeded(phi3.Phi3Attention(CONFIG, 0)).eval()
    module.qkv_proj.bias = nn.Parameter(torch.linspace(-1, 1, module.qkv_proj.out_features))
    argument = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))
    rotary, mask = rotary_of(5), torch.full((5, 5), -1e9).triu(1)[None, None]
    with torch.no_grad():
        plain, _ = module(argument, rotary, mask)
        with applied((fused_attention(phi3.Phi3Attention),)):
            found, _ = module(argument, past_key_values=StandIn(rotary, mask))
    assert_near(found, plain)


def test_fixed_rotary_is_the_short_factor_at_any_length() -> None:
    with applied((fixed_rotary(phi3.Phi3RotaryEmbedding),)):
        fixed = rotary_of(SHORT + 4)
    for found, short, long in zip(fixed, rotary_of(SHORT), rotary_of(SHORT + 4), strict=True):
        torch.testing.assert_close(found[:, :SHORT], short, rtol=1e-6, atol=1e-6)
        assert float(short.abs().max()) > 0.9
        assert float((found - long).abs().max()) > 0.1  # transformers has gone over to the long factor
    assert float(fixed[0].max()) > 1.1  # longrope scales both, by sqrt(1 + log(4) / log(16)) here
