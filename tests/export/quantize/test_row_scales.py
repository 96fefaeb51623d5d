"""Products of int8 behind each other: the scale of a row goes past the next quantization, into its product.

x [B, S, K] is an input; up = x @ U.T, gated = x * up, down = gated @ D.T, as in a gated MLP.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from stillgraph.exporter.quantize.lower import StoragePlan
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.manifest import Quantization
from tests.products import floats, store, unstored

pytestmark = pytest.mark.kernels
K = 48
NAMES = ("u.weight", "d.weight")
FAST = StoragePlan("onnxruntime", "int8", Quantization(block_size=32), fast=True)


def tensor(name: str) -> torch.Tensor:
    return torch.randn(K, K, generator=torch.Generator().manual_seed(ord(name[0])))


def quantized(name: str) -> np.ndarray:
    return quantize(tensor(name), Format.channel(K)).dequantize().numpy()


def graph(
    batch: int, tokens: int, folder: Path, outputs: tuple[str, ...], factors: tuple[str, str] = ("x", "up")
) -> Path:
    nodes = [
        helper.make_node("Transpose", ["u.weight"], ["ut"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "ut"], ["up"]),
        helper.make_node("Mul", factors, ["gated"]),
        helper.make_node("Transpose", ["d.weight"], ["dt"], perm=[1, 0]),
        helper.make_node("MatMul", ["gated", "dt"], ["down"]),
    ]
    shape = (batch, tokens, K)
    ports = floats({"x": shape}), floats(dict.fromkeys(outputs, shape))
    made = unstored(nodes, *ports, dict.fromkeys(NAMES, (K, K)))
    return store(made, FAST, tensor, folder)[0]


@pytest.mark.parametrize("factors", [("x", "up"), ("up", "x")])
@pytest.mark.parametrize("outputs", [("down",), ("down", "up")])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 3), (2, 3)])
def test_the_product_is_of_the_scaled_rows(
    batch: int, tokens: int, outputs: tuple[str, ...], factors: tuple[str, str], tmp_path: Path
) -> None:
    """Rows of very different sizes, whose scales are as different; also where others read what was scaled."""
    path = graph(batch, tokens, tmp_path, outputs, factors)
    x = np.random.default_rng(0).standard_normal((batch, tokens, K)).astype(np.float32)
    x *= 10.0 ** np.arange(batch * tokens).reshape(batch, tokens, 1)
    got = dict(zip(outputs, ort.InferenceSession(str(path)).run(list(outputs), {"x": x}), strict=True))
    gated = x * (x @ quantized("u.weight").T)
    for name, expected in (("down", gated @ quantized("d.weight").T), ("up", gated / x)):
        if name in got:
            largest = np.abs(expected).max(-1, keepdims=True)
            assert (np.abs(got[name] - expected) / largest).max() < 0.05  # two roundings to 8 bits


def test_what_is_quantized_next_is_not_scaled_before(tmp_path: Path) -> None:
    nodes = onnx.load(graph(1, 3, tmp_path, ("down",)), load_external_data=False).graph.node
    made = {name: node for node in nodes for name in node.output}
    products = [node for node in nodes if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 2
    quantize_node = made[products[1].input[0]]
    gate = made[quantize_node.input[0]]
    assert gate.op_type == "Mul"
    assert products[0].output[0] in gate.input
