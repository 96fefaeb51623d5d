"""The largest codes of every product form against sums of integers: equal, on every CPU, bit for bit.

What the graphs are is told in tests/cpus/products.py. Run as another class of CPU by tests/cpus/emulated.py.
"""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from stillgraph.exporter.quantize.rounding import PAIR_SUM, PAIRED, Format, quantize
from tests.cpus import products, sums
from tests.cpus.products import Case

pytestmark = pytest.mark.kernels
FORMS = sorted({case.product for case in products.cases()})
OF_FORM = {form: [case for case in products.cases() if case.product == form] for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_the_sums_are_those_of_integers(form: str, tmp_path: Path) -> None:
    differences = {}
    for case in OF_FORM[form]:
        products.build(case, tmp_path / case.name)
        found = sums.difference(tmp_path / case.name)
        if found is not None:
            differences[case.name] = found
    assert differences == {}


def test_every_form_and_size_is_there() -> None:
    assert Counter(form.split()[0] for form in FORMS) == {
        "channel": 1, "blocked": 12, "dequantized": 12, "table": 12, "columns": 12,
    }  # fmt: skip
    for form, cases in OF_FORM.items():
        gather = form.split()[0] in products.GATHERS
        sizes = {(case.columns, case.entries if gather else case.rows) for case in cases}
        others = (products.ENTRIES, products.EVEN) if gather else products.ROWS
        assert sizes == {(columns, other) for columns in products.COLUMNS for other in others}


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("dequantized")])
def test_the_portable_product_is_fused(form: str, tmp_path: Path) -> None:
    """Else its sums would be those of fp32 weights, whose kernels are no matter here."""
    for case in OF_FORM[form]:
        products.build(case, tmp_path / case.name)
        sums.outputs(tmp_path / case.name, optimized=tmp_path / "optimized.onnx")
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        assert [node.op_type for node in nodes] == ["MatMulNBits"]
        assert [a.i for node in nodes for a in node.attribute if a.name == "accuracy_level"] == [4]


def quads() -> np.ndarray:
    """Levels of `PAIRED` columns whose largest two of one sign add up to `PAIR_SUM`, in every place."""
    pairs = [(a, PAIR_SUM - a) for a in range(PAIR_SUM // 2, 128)]
    rows = [[*pair, 0, 0] for pair in pairs] + [[*pair, -64, -64] for pair in pairs]
    rows += [[PAIR_SUM // 2] * PAIRED, [127, 1, 1, 1], [96, 32, 32, 32]]
    found = {order for row in rows for sign in (1, -1) for order in permutations(sign * n for n in row)}
    return np.array([*sorted(found), *sorted(set(permutations([-128, 0, 0, 0])))])


@pytest.mark.parametrize("columns", [4, 35, 96])
def test_pairs_at_the_limit_fit_into_16_bits(columns: int, tmp_path: Path) -> None:
    """With activations of all 255, all 1 and both in turns: what they are as uint8."""
    rows = quads()
    levels = np.tile(rows, -(-columns // PAIRED))[:, :columns]
    case = Case("channel", Format.channel(columns), columns, entries=len(rows))
    quantized = products.given(case, levels)
    codes = quantized.codes.numpy().astype(int) - case.form.middle
    np.testing.assert_array_equal(codes, levels)  # the rule has nothing to take from them
    products.build(case, tmp_path, quantized)
    assert sums.difference(tmp_path) is None


@pytest.mark.parametrize("matrix", ["alike", "in turns", "one towers"])
def test_channels_as_they_are_quantized(matrix: str, tmp_path: Path) -> None:
    """Codes and scales of `quantize`, where nothing is given but weights that want the largest codes."""
    columns = 130
    values = torch.rand(products.ENTRIES, columns, generator=torch.Generator().manual_seed(0)) / 8 + 1
    if matrix == "in turns":
        values[:, ::2] *= -1
    if matrix == "one towers":
        values[:, ::PAIRED] *= 20
    case = Case("channel", Format.channel(columns), columns)
    products.build(case, tmp_path, quantize(values, case.form))
    x, weights, found = sums.outputs(tmp_path)
    # The sum is exact; scales of weights and of rows are rounded, and what is made of the two.
    error = np.abs(found - x @ weights.T)
    assert np.all(error <= 4 * 2.0**-24 * np.abs(x) @ np.abs(weights).T)
