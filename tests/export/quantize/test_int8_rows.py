"""Products of inputs in 8 bits: the first tokens of a call have 16 where the outputs are the fewer ones.

x [B, S, K] times weights [N, K], which are rounded to one scale a row; the products with these are expected.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from stillgraph.exporter.quantize.int8_rows import FIRST
from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.exporter.quantize.sensitivity import of_int8_rows
from stillgraph.manifest import Quantization
from tests.products import floats, store, unstored

pytestmark = pytest.mark.kernels
K = 96
FAST = StoragePlan("onnxruntime", "int8", Quantization(block_size=32), fast=True)


def matrix(rows: int) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))


def inputs(batch: int, tokens: int) -> np.ndarray:
    """Of which the first token has one that is far larger than all others."""
    x = np.random.default_rng(0).standard_normal((batch, tokens, K)).astype(np.float32)
    x[:, 0, 7] = 500
    return x


def run(x: np.ndarray, rows: int, folder: Path) -> np.ndarray:
    nodes = [
        helper.make_node("Transpose", ["w.weight"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
    ]
    ports = floats({"x": x.shape}), floats({"y": (*x.shape[:-1], rows)})
    made = unstored(nodes, *ports, {"w.weight": (rows, K)})
    path, _ = store(made, FAST, lambda name: matrix(rows), folder)
    found: np.ndarray = ort.InferenceSession(str(path)).run(None, {"x": x})[0]
    return found


def errors(x: np.ndarray, rows: int, folder: Path) -> np.ndarray:
    """Of each token's products, in steps of its largest input / 127 times the length of a row of weights."""
    stored = quantize(matrix(rows), Format.channel(K)).dequantize().double().numpy()
    error = run(x, rows, folder) - x.astype(np.float64) @ stored.T
    step = np.abs(x).max(-1, keepdims=True) / 127 * np.linalg.norm(stored, axis=1)
    found: np.ndarray = np.sqrt(np.square(error / step).mean(-1))
    return found


@pytest.mark.parametrize(("batch", "tokens"), [(1, 24), (3, 24), (2, FIRST), (1, 3)])
def test_first_tokens_have_16_bits(batch: int, tokens: int, tmp_path: Path) -> None:
    """An error of a step is uniform: its root mean square is that of 1/12; of the finer ones 1/254 of it."""
    found = errors(inputs(batch, tokens), K - 32, tmp_path)
    assert found[:, :FIRST].max() < 2 * np.sqrt(1 / 12) / 254
    if tokens > FIRST:
        assert found[:, FIRST:].mean() == pytest.approx(np.sqrt(1 / 12), rel=0.1)


def test_a_product_that_does_not_narrow_has_8_bits_for_all_tokens(tmp_path: Path) -> None:
    found = errors(inputs(2, 24), K, tmp_path)
    assert found.mean() == pytest.approx(np.sqrt(1 / 12), rel=0.1)
    assert found.min() > 0.1


@pytest.mark.parametrize("rows", [K - 32, K])
def test_the_measure_of_what_it_costs_adds_what_the_graph_adds(rows: int, tmp_path: Path) -> None:
    x, weight = inputs(2, 24), matrix(rows)
    made = run(x, rows, tmp_path) - x.astype(np.float64) @ weight.T.double().numpy()
    foretold = of_int8_rows("", torch.from_numpy(x), weight).numpy()
    assert np.abs(foretold - made).max() < 0.02 * np.abs(made).max()


def test_rows_of_zeros_stay_zeros(tmp_path: Path) -> None:
    assert not run(np.zeros((1, 12, K), np.float32), K - 32, tmp_path).any()
