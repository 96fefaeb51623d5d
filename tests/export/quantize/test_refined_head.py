"""A head of eight bits that scores by four: against numpy, which unpacks the file as the manifest says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillgraph.exporter.quantize.lower import LEAST_HEAD
from stillgraph.exporter.quantize.rounding import Quantized, quantize
from stillgraph.exporter.validate.fake_quantize import RefinedHead
from stillgraph.manifest import Weights
from tests.export.quantize.test_lower import Case, assert_product, lowered, ops, plan, run

pytestmark = pytest.mark.kernels
REFINE = 8
CASE = Case(entries=LEAST_HEAD * REFINE, columns=80, tokens=4)  # 80 is no multiple of a block
HOW = plan("onnxruntime", "int4", block_size=64, keep={"lm_head": "int8"}, refine=REFINE)


def unpacked(folder: Path, stored: Weights, layout: str) -> Any:
    """The levels [N, columns] of a plane, or fp32 scales [N, L]."""
    tensor = next(tensor for tensor in stored.tensors.values() if tensor.layout == layout)
    content = (folder / stored.file.path).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.bits == 32:
        return np.frombuffer(content, np.float32).reshape(tensor.shape)
    pairs = np.frombuffer(content, np.uint8).reshape(CASE.entries, -1)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(CASE.entries, -1)
    return codes.astype(np.float32) - 8


def planes(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, Path]:
    """The coarse half of each weight, all of it, its scale [N, K], and the graph."""
    path, stored = lowered(CASE, HOW, folder)
    scale = np.repeat(unpacked(folder, stored, "coarse_scales"), 32, axis=1)
    coarse = unpacked(folder, stored, "coarse") * scale
    whole = coarse + unpacked(folder, stored, "fine") / 16 * scale
    return *(part[:, : CASE.columns] for part in (coarse, whole, scale)), path


def test_rows_have_eight_bits(tmp_path: Path) -> None:
    _, whole, scale, path = planes(tmp_path)
    np.testing.assert_allclose(run(path, CASE.ids())["rows"], whole[CASE.ids()], rtol=1e-6, atol=1e-6)
    off, scale = np.abs(whole - CASE.matrix("embed.weight").numpy()), np.abs(scale)
    assert (
        off <= scale / 16 * 1.01
    ).all()  # a level of eight bits: half of one, and more where it is clipped
    assert np.sqrt(np.mean((off / scale * 16) ** 2)) < 0.32  # uniform rounding has 0.29


def fits(found: np.ndarray, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Which of [N] logits are products with a row of weight [N, K], as `assert_product` has it."""

    def one(token: int) -> bool:
        try:
            assert_product(found[token : token + 1], x, weight[token : token + 1], 32)
        except AssertionError:
            return False
        return True

    return np.array([one(token) for token in range(len(found))])


def test_the_best_scores_have_eight_bits_and_the_others_four(tmp_path: Path) -> None:
    """Which of two nearly equal scores is the last to be refined, depends on how activations are rounded."""
    coarse, whole, _, path = planes(tmp_path)
    got = run(path, CASE.ids())
    x, logits = got["rows"].reshape(-1, CASE.columns), got["logits"].reshape(-1, CASE.entries)
    for row, found in enumerate(logits):
        scores = x[row] @ coarse.T
        rank = (scores > scores[:, None]).sum(-1)  # numpy sorts wrongly as qemu 7.2 emulates AVX2
        eight, four = fits(found, x[row], whole), fits(found, x[row], coarse)
        assert eight[rank < REFINE // 2].all()
        assert four[rank >= REFINE * 2].all()
        assert (eight | four).all()
        assert (~four).sum() <= REFINE  # or more than the best would be refined
        assert (~four).any()  # or this would show nothing
    assert (logits.argmax(-1) == (x @ whole.T).argmax(-1)).all()


def test_torch_has_the_same_head(tmp_path: Path) -> None:
    path = planes(tmp_path)[3]
    got = run(path, CASE.ids())
    rounded: Quantized = quantize(CASE.matrix("embed.weight"), HOW.form("int8", nested=True))
    head = RefinedHead(torch.nn.Parameter(rounded.dequantize()), rounded, REFINE)
    with torch.no_grad():
        made = head(torch.from_numpy(got["rows"])).numpy()
    error = np.abs(made - got["logits"])
    assert error.max() / np.abs(made).max() < 0.02  # activations of eight bits; four bits of weights give 0.1


@pytest.mark.parametrize(
    ("entries", "change"),
    [(CASE.entries - 1, {}), (CASE.entries, {"refine": 0}), (CASE.entries, {"keep": {"lm_head": "int4"}})],
)
def test_other_heads_are_one_product(entries: int, change: dict[str, Any], tmp_path: Path) -> None:
    values = {"block_size": 64, "keep": {"lm_head": "int8"}, "refine": REFINE} | change
    path, _ = lowered(Case(entries=entries), plan("onnxruntime", "int4", **values), tmp_path)
    assert ops(path)["TopK"] == 0
    assert ops(path)["MatMulNBits"] == 2


def test_four_bits_alone_have_no_bias(tmp_path: Path) -> None:
    """Of inputs that all are positive, which add up what the fine halves of a row have in common."""
    coarse, whole, scale, _ = planes(tmp_path)
    rows = (coarse - whole).mean(-1) / np.abs(scale).mean(-1)  # in coarse steps, of which a bias has 1 / 32
    spread = np.sqrt(1 / 12 / CASE.columns / CASE.entries)  # of the mean of uniform errors
    assert abs(rows.mean()) < 4 * spread + 0.005
