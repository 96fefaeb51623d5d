"""Graphs with quantized weights against numpy with the same weights dequantized."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from stillgraph.exporter.ir.fold_weights import Weight
from stillgraph.exporter.ir.simplify import static_problem
from stillgraph.exporter.quantize import layouts
from stillgraph.exporter.quantize.lower import StoragePlan, lower
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.manifest import Precision, Quantization, Target, Weights
from stillgraph.spec import GraphShape
from tests.products import floats, store, unstored

pytestmark = pytest.mark.kernels
V, N, K = 7, 5, 80  # entries, rows of weights, columns: odd, odd, and not a multiple of a block
ROWS = 3
# fp32 sums of K products in another order than numpy's.
ORDER = 80 * 2.0**-23


@dataclass(frozen=True)
class Case:
    """A tied model without its middle: rows = E[ids], y = rows @ W.T, logits = rows @ E.T."""

    entries: int = V
    columns: int = K
    tokens: int = ROWS

    def tensor(self, name: str) -> torch.Tensor:
        shape = {"embed.weight": (self.entries, self.columns), "q.weight": (2, self.columns)}
        seed = torch.Generator().manual_seed(len(name))
        return torch.randn(*shape.get(name, (N - 2, self.columns)), generator=seed)

    def matrix(self, name: str) -> torch.Tensor:
        return (
            torch.cat([self.tensor("q.weight"), self.tensor("kk.weight")])
            if name == "W"
            else self.tensor(name)
        )

    def model(self) -> tuple[ir.Model, list[Weight]]:
        nodes = [
            helper.make_node("Gather", ["embed.weight", "ids"], ["rows"]),
            helper.make_node("Concat", ["q.weight", "kk.weight"], ["qk"], axis=0),
            helper.make_node("Transpose", ["qk"], ["qk_t"], perm=[1, 0]),
            helper.make_node("MatMul", ["rows", "qk_t"], ["y"]),
            helper.make_node("Transpose", ["embed.weight"], ["head"], perm=[1, 0]),
            helper.make_node("MatMul", ["rows", "head"], ["logits"]),
        ]
        shape = (2, self.tokens)
        widths = {"rows": self.columns, "y": N, "logits": self.entries}
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, shape)
        outputs = floats({name: (*shape, width) for name, width in widths.items()})
        tensors = {name: self.tensor(name).shape for name in ("embed.weight", "q.weight", "kk.weight")}
        return unstored(nodes, [ids], outputs, tensors)

    def ids(self) -> np.ndarray:
        return np.arange(2 * self.tokens).reshape(2, self.tokens) % self.entries


def plan(target: Target, precision: Precision, *, fast: bool = False, **values: Any) -> StoragePlan:
    return StoragePlan(target, precision, Quantization(**{"block_size": 32, **values}), fast)


def lowered(case: Case, how: StoragePlan, folder: Path) -> tuple[Path, Weights]:
    return store(case.model(), how, case.tensor, folder)


def run(path: Path, ids: np.ndarray, optimized: bool = True) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3  # that the optimized graph is for this CPU alone
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"ids": ids}), strict=True))


def ops(path: Path) -> dict[str, int]:
    return collections.Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)


def assert_product(got: np.ndarray, x: np.ndarray, weight: np.ndarray, block: int | None) -> None:
    """got is x @ weight.T with activations rounded to int8, with a scale for each block of them (None: fp32).

    A block is stored in steps of its largest magnitude / 127, so that each activation is off by half a step.
    """
    magnitudes = np.abs(x)
    bound = ORDER * magnitudes @ np.abs(weight).T
    for start in range(0, x.shape[-1], block or x.shape[-1]) if block else ():
        part = slice(start, start + block)
        half_step = magnitudes[..., part].max(-1, keepdims=True) / 254
        bound = bound + half_step * np.abs(weight[:, part]).sum(-1) * (
            1 + 1e-3
        )  # that the step too is rounded
    assert np.all(np.abs(got - x @ weight.T) <= bound)


FORMS = [(bits, block, sym) for bits in ("int4", "int8") for block in (32, 64, 128) for sym in (True, False)]


@pytest.mark.parametrize(("precision", "block", "symmetric"), FORMS)
@pytest.mark.parametrize("case", [Case(), Case(entries=6, columns=256, tokens=1)], ids=str)
@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_a_lowered_graph_computes_with_the_dequantized_weights(
    target: Target, precision: Precision, block: int, symmetric: bool, case: Case, tmp_path: Path
) -> None:
    how = plan(target, precision, block_size=block, symmetric=symmetric)
    path, _ = lowered(case, how, tmp_path)
    embedding, matrix = (
        quantize(case.matrix(name), how.form(precision)).dequantize().numpy()
        for name in ("embed.weight", "W")
    )
    for optimized in (False, True):
        got = run(path, case.ids(), optimized)
        rows = embedding[case.ids()]
        np.testing.assert_array_equal(got["rows"], rows)
        in_fp32 = target == "portable" and not optimized
        assert_product(got["y"], rows, matrix, None if in_fp32 else block)
        assert_product(got["logits"], rows, embedding, None if in_fp32 else block)


@pytest.mark.parametrize(("precision", "block", "symmetric"), FORMS)
def test_onnxruntime_fuses_the_products_of_the_portable_graph(
    precision: Precision, block: int, symmetric: bool, tmp_path: Path
) -> None:
    case = Case(entries=20)  # tiny weights of equal contents become one with two readers, and are not fused
    path, _ = lowered(case, plan("portable", precision, block_size=block, symmetric=symmetric), tmp_path)
    run(path, case.ids())
    counts = ops(path.with_suffix(".optimized"))
    assert (counts["MatMulNBits"], counts["MatMul"], counts["FusedMatMul"]) == (2, 0, 0)
    assert counts["DequantizeLinear"] == 1  # of the columns that were gathered
    level = [
        attribute.i
        for node in onnx.load(path.with_suffix(".optimized"), load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert level == [4, 4]


@pytest.mark.parametrize("how", [plan("onnxruntime", "int4"), plan("portable", "int4"),
                                 plan("onnxruntime", "int4", fast=True),
                                 plan("portable", "int8", symmetric=False)], ids=str)  # fmt: skip
@pytest.mark.parametrize("entries", [V, 6])
def test_every_value_of_a_lowered_graph_is_static(how: StoragePlan, entries: int, tmp_path: Path) -> None:
    model, recipes = Case(entries).model()
    recipes = lower(model, recipes, how)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    assert static_problem(proto.graph) is None
    assert {value.name for value in model.graph.inputs} == {"ids", *(recipe.name for recipe in recipes)}
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    assert static_problem(inferred.graph) is None


@pytest.mark.parametrize(
    ("target", "symmetric", "names_twice"),
    [("onnxruntime", True, 1), ("onnxruntime", False, 1), ("portable", True, 2), ("portable", False, 3)],
)
def test_the_embedding_is_the_bytes_of_the_tied_head(
    target: Target, symmetric: bool, names_twice: int, tmp_path: Path
) -> None:
    _, stored = lowered(Case(entries=6, columns=64), plan(target, "int4", symmetric=symmetric), tmp_path)
    places = {name: place for name, place in stored.tensors.items() if name.startswith("embed.weight")}
    assert len(places) - len({place.offset for place in places.values()}) == names_twice
    codes, scales, zeros = 6 * 64 // 2, 6 * 2 * 4, 0 if symmetric else 6
    last = {place.offset: place.nbytes for place in places.values()}
    assert sum(last.values()) == codes + scales + zeros


def test_a_matrix_is_quantized_once_for_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(layouts, "quantize", lambda matrix, form: seen.append(form) or quantize(matrix, form))
    lowered(Case(), plan("onnxruntime", "int4", symmetric=False), tmp_path)
    assert seen == [Format(4, 32, symmetric=False)] * 2


def test_what_is_kept_is_stored_as_it_says(tmp_path: Path) -> None:
    keep = {"lm_head": "fp32", "q": "int8"}
    _, stored = lowered(Case(), plan("onnxruntime", "int4", keep=keep), tmp_path)
    names = {"embed.weight", "embed.weight.transpose", "q+kk.weight.int8.packed", "q+kk.weight.int8.scales"}
    assert set(stored.tensors) == names


@pytest.mark.parametrize(
    ("keep", "sources", "tied", "expected"),
    [
        ({"down_proj": "int8"}, ["m.layers.1.mlp.down_proj.weight"], False, "int8"),
        ({"down": "int8"}, ["m.layers.1.mlp.down_proj.weight"], False, "int4"),  # whole parts only
        ({"down*": "int8"}, ["m.layers.1.mlp.down_proj.weight"], False, "int8"),
        ({"layers.1": "int8"}, ["m.layers.11.mlp.down_proj.weight"], False, "int4"),
        ({"layers.[01].mlp": "int8"}, ["m.layers.1.mlp.down_proj.weight"], False, "int8"),
        ({"layers.*.down_proj": "int8"}, ["m.layers.1.mlp.down_proj.weight"], False, "int8"),
        ({"m.layers.1.mlp.down_proj.weight": "fp32"}, ["m.layers.1.mlp.down_proj.weight"], False, "fp32"),
        ({"layers": "int8", "layers.1": "int4"}, ["m.layers.1.q.weight"], False, "int4"),  # the last decides
        (
            {"v_proj": "int8"},
            ["a.q_proj.weight", "a.v_proj.weight"],
            False,
            "int8",
        ),  # the highest of a product
        ({"lm_head": "int8"}, ["m.embed_tokens.weight"], True, "int8"),
        ({"embed_tokens": "int8"}, ["m.embed_tokens.weight"], True, "int8"),
        ({"lm_head": "int8"}, ["m.embed_tokens.weight"], False, "int4"),
    ],
)
def test_patterns(keep: dict[str, str], sources: list[str], tied: bool, expected: str) -> None:
    assert plan("onnxruntime", "int4", keep=keep).precision_of(sources, tied) == expected


def test_activations_are_rounded_by_half_a_127th_of_a_rows_largest(tmp_path: Path) -> None:
    """Rounding errors are uniform over a step: their variance is step**2 / 12, and a product adds them up."""
    case = Case(entries=64, tokens=64)
    path, _ = lowered(case, plan("onnxruntime", "int4", fast=True), tmp_path)
    got = run(path, case.ids())
    weight = quantize(case.matrix("embed.weight"), Format.channel(K)).dequantize().numpy()
    steps = np.abs(got["rows"]).max(-1, keepdims=True) / 127
    expected = np.sqrt((steps**2 / 12 * (weight**2).sum(-1)).mean())
    error = np.sqrt(((got["logits"] - got["rows"] @ weight.T) ** 2).mean())
    assert error / expected == pytest.approx(1, abs=0.1)  # of 8192 products; a step twice as long gives 2


def test_products_of_blocks_ask_for_int8_activations() -> None:
    model, recipes = Case().model()
    lower(model, recipes, plan("onnxruntime", "int4"))
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert [node.attributes["accuracy_level"].as_int() for node in products] == [4, 4]


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_fast_graph_multiplies_int8_with_int8(precision: Precision, tmp_path: Path) -> None:
    case, how = Case(), plan("onnxruntime", precision, fast=True)
    path, stored = lowered(case, how, tmp_path)
    got = run(path, case.ids())
    assert ops(path)["MatMulIntegerToFloat"] == 2
    assert ops(path)["QuantizeLinear"] == 2  # of one input, and of what is left over, for both products
    assert stored.tensors["q+kk.weight.int8.channels"].shape == (K, N)
    for output, name in (("y", "W"), ("logits", "embed.weight")):
        weight = quantize(case.matrix(name), Format.channel(K)).dequantize().numpy()
        assert_product(got[output], got["rows"], weight, K)


def test_a_fast_graph_keeps_what_is_to_stay_in_blocks(tmp_path: Path) -> None:
    case, how = Case(), plan("onnxruntime", "int8", fast=True, blocked=("kk",))
    path, stored = lowered(case, how, tmp_path)
    assert (ops(path)["MatMulNBits"], ops(path)["MatMulIntegerToFloat"]) == (1, 1)
    assert stored.tensors["q+kk.weight.int8.packed"].layout == "packed"
    assert "q+kk.weight.int8.channels" not in stored.tensors
    got = run(path, case.ids())
    assert_product(
        got["y"], got["rows"], quantize(case.matrix("W"), how.form("int8")).dequantize().numpy(), K
    )


def test_weights_in_blocks_and_others_are_products_of_their_own() -> None:
    shape = GraphShape(role="prefill", max_len=8, ctx=16, slack=8)
    how = {"block_size": 32, "blocked": ("layers.0.v_proj",)}
    names = [f"layers.0.{name}_proj.weight" for name in "qkv"]
    for fast, kinds in ((True, 2), (False, 1)):
        made = StoragePlan("onnxruntime", "int8", Quantization(**how), fast)
        assert len({made.alike(name, shape) for name in names}) == kinds
        assert made.alike(names[0], shape) == made.alike(names[1], shape)


def test_a_fast_graph_keeps_products_of_one_token(tmp_path: Path) -> None:
    path, _ = lowered(Case(tokens=1), plan("onnxruntime", "int4", fast=True), tmp_path)
    assert (ops(path)["MatMulNBits"], ops(path)["MatMulIntegerToFloat"]) == (2, 0)


def test_rows_of_a_fast_product_do_not_depend_on_each_other(tmp_path: Path) -> None:
    case = Case()
    path, _ = lowered(case, plan("onnxruntime", "int4", fast=True), tmp_path)
    first = run(path, case.ids())["y"]
    other = case.ids()
    other[0, 1] = other[1, 2] = 6
    second = run(path, other)["y"]
    np.testing.assert_array_equal(second[other == case.ids()], first[other == case.ids()])


def test_a_row_of_zeros_gives_zeros(tmp_path: Path) -> None:
    class Zeros(Case):
        def tensor(self, name: str) -> torch.Tensor:
            tensor = super().tensor(name)
            tensor[0] = 0
            return tensor

    case = Zeros()
    for fast in (True, False):
        folder = tmp_path / str(fast)
        folder.mkdir()
        path, _ = lowered(case, plan("onnxruntime", "int4", fast=fast), folder)
        got = run(path, case.ids())
        assert not got["rows"][0, 0].any()
        np.testing.assert_array_equal(got["y"][0, 0], np.zeros(N))
        assert np.isfinite(got["logits"]).all()
