"""Our attention against the one of transformers: same scores, keys never expanded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from stillgraph.exporter.trace import attention
from stillgraph.exporter.trace.attention import MASKED, additive_mask, portable_attention
from stillgraph.exporter.trace.static_cache import visible

# Sums of fp32 in another order, relative to values of about 1; measured 4e-7.
CLOSE = {"rtol": 0.0, "atol": 3e-6}


def tensors(
    heads: int, kv_heads: int, tokens: int, capacity: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads + tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (
        normal(2, heads, tokens, size),
        normal(2, kv_heads, capacity, size),
        normal(2, kv_heads, capacity, size),
    )


def theirs(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    module = nn.Module()
    module.num_key_value_groups = query.shape[1] // key.shape[1]  # type: ignore[assignment]
    mask = torch.where(seen, 0.0, MASKED)[:, None]
    return eager_attention_forward(module, query, key, value, mask, scaling=0.3, softcap=softcap)[0]


def test_large_towers_attend_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of 4096 patches would be a gigabyte; parts of them give the same."""
    query, key, value = torch.randn(3, 1, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    whole, _ = attention.portable_attention(nn.Module(), query, key, value, None, 0.3)
    sizes, softmax = list[int](), torch.softmax

    def counted(scores: Tensor, **options: Any) -> Tensor:
        sizes.append(scores.numel())
        return softmax(scores, **options)

    monkeypatch.setattr(torch, "softmax", counted)
    monkeypatch.setattr(attention, "PART", 2 * 50 * 16)
    parts, _ = attention.portable_attention(nn.Module(), query, key, value, None, 0.3)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert sizes == [1600, 1600, 1600, 200]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 8), (6, 3, 24), (4, 1, 24), (6, 2, 7)])
def test_same_as_eager_attention(
    heads: int, kv_heads: int, size: int, tokens: int, softcap: float | None
) -> None:
    query, key, value = tensors(heads, kv_heads, tokens, 9, size)
    positions = torch.arange(tokens)[None] + torch.tensor([0, 4])[:, None]
    seen = visible(positions, 9, window=3)
    mask = additive_mask(seen, heads // kv_heads)
    found, weights = portable_attention(nn.Module(), query, key, value, mask, 0.3, softcap, sliding_window=3)
    assert weights is None
    assert found.shape == (2, tokens, heads, size)
    torch.testing.assert_close(found, theirs(query, key, value, seen, softcap), **CLOSE)


def test_the_softcap_is_felt() -> None:
    query, key, value = tensors(4, 2, 3, 9, 8)
    mask = additive_mask(torch.ones(2, 3, 9, dtype=torch.bool), 2)
    plain, capped = (
        portable_attention(nn.Module(), query, key, value, mask, 0.3, cap)[0] for cap in (None, 0.5)
    )
    assert (plain - capped).abs().max() > 1e-2


def test_a_row_that_sees_nothing_stays_a_number_and_touches_no_other() -> None:
    """Padding rows: what they see is of no interest, a NaN from them would be."""
    query, key, value = tensors(4, 2, 3, 9, 8)
    seen = visible(torch.tensor([[4, 5, 6], [0, 1, 2]]), 9, None)
    nothing = seen.clone()
    nothing[:, 2] = False
    full, part = (
        portable_attention(nn.Module(), query, key, value, additive_mask(mask, 2), 0.3)[0]
        for mask in (seen, nothing)
    )
    assert torch.isfinite(part).all()
    assert torch.equal(full[:, :2], part[:, :2])


def test_hidden_keys_of_any_size_do_not_reach_the_result() -> None:
    query, key, value = tensors(4, 2, 1, 9, 8)
    seen = visible(torch.tensor([[3], [6]]), 9, window=2)
    mask = additive_mask(seen, 2)
    before, _ = portable_attention(nn.Module(), query, key, value, mask, 0.3)
    hidden = ~seen[:, 0, None, :, None]
    after, _ = portable_attention(
        nn.Module(), query, key.masked_fill(hidden, 1e4), value.masked_fill(hidden, -1e4), mask, 0.3
    )
    assert torch.equal(before, after)


def test_the_mask_repeats_its_rows_for_each_head_of_a_group() -> None:
    mask = additive_mask(torch.tensor([[[True, False], [True, True]]]), groups=2)
    assert mask.tolist() == [[[[0.0, MASKED], [0.0, 0.0], [0.0, MASKED], [0.0, 0.0]]]]
    assert additive_mask(torch.tensor([[[True, False]]]), groups=2).shape == (1, 1, 1, 2)
