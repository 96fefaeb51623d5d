"""What a weights file says: read without the code that wrote it, and held to be near the checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stillgraph.errors import CheckFailed
from stillgraph.exporter import weights
from stillgraph.exporter.ir.fold_weights import Recipe
from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize.layouts import Matrix
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.exporter.validate.shipped import Shipped, check_near
from stillgraph.spec import Frozen

N, K = 5, 80
PARTS = {
    "packed": (layouts.packed, layouts.scales, layouts.zeros),
    "columns": (layouts.columns, layouts.column_scales, layouts.column_zeros),
}


class File(Frozen):
    path: str


class Stored(Frozen):
    """What `Shipped` reads of a manifest."""

    weights: object


@pytest.mark.parametrize("layout", PARTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_reads_what_quantize_means(layout, bits, block, symmetric, tmp_path) -> None:
    tensors = {
        name: torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
        for name, rows in (("a.weight", 2), ("b.weight", N - 2))
    }
    matrix = Matrix(Recipe(tuple(tensors), (N, K)), Format(bits, block, symmetric))
    parts = [part for make in PARTS[layout] if (part := make(matrix)) is not None]
    stored = weights.write(tmp_path, parts, tensors.__getitem__)
    shipped = Shipped(tmp_path, Stored(weights=stored))
    codes = stored.tensors[parts[0].name]
    found = shipped.rows("b.weight", codes, 2, tensors["b.weight"].numpy())
    expected = quantize(torch.cat(list(tensors.values())), matrix.form).dequantize()[2:]
    np.testing.assert_array_equal(found, expected.numpy())
    for wrong in (tensors["b.weight"].flip(0), tensors["b.weight"].flip(1), tensors["b.weight"].roll(1)):
        with pytest.raises(CheckFailed, match="from the checkpoint"):
            shipped.rows("b.weight", codes, 2, wrong.numpy())


def test_one_block_elsewhere_is_found_and_named() -> None:
    original = np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32)
    stored = quantize(torch.from_numpy(original), Format(4, 64))
    found, step = stored.dequantize().numpy(), stored.scales.abs().repeat_interleave(64, 1).numpy()
    check_near("w", found, step, original, 64)
    found[3, 64:] = found[2, 64:]
    with pytest.raises(CheckFailed, match="row 3, block 1 of w is"):
        check_near("w", found, step, original, 64)
    found[3] = original[3] * 1.7
    with pytest.raises(CheckFailed, match=r"row 3 of w is 1\.9 steps"):
        check_near("w", found, step, original, 64)
