"""The forms of a product: each computes the same, the faster one is compiled, and what is missing is
reported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from stillgraph import load, loading, session
from stillgraph.compiled import Form, Products, ProductTime, find
from stillgraph.exporter.compile import kernel_choice, product_times
from stillgraph.exporter.compile.compile import compile_bundle
from stillgraph.manifest import Manifest, Quantization, read

Bundle = Callable[..., Path]
N, K = 24, 64


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def fast(tiny_bundle: Bundle) -> Path:
    return tiny_bundle(target="onnxruntime", precision="int4", fast_prefill=True)


def timed(blocks: float, channels: float, rows: int) -> list[ProductTime]:
    times: dict[Form, float] = {"fp32": 9.0, "blocks": blocks, "channels": channels}
    return [ProductTime(form=form, rows=count, ms=ms) for form, ms in times.items() for count in (1, rows)]


@pytest.mark.parametrize("form", ["fp32", "blocks", "channels"])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_timed_is_the_product(fast: Path, form: Form, rows: int) -> None:
    """Each copy of it; in fp32 to the order of its sums, else to the rounding of weights and activations."""
    model = kernel_choice._model(read(fast), form, (N, K), rows, 3)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    x = np.random.default_rng(1).standard_normal((1, rows, K)).astype(np.float32)
    weights = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).numpy() / K**0.5
    results = session.run(None, {"x": x})
    assert len(results) == 3
    for result in results:
        error = np.linalg.norm(result - x @ weights.T) / np.linalg.norm(x @ weights.T)
        assert error < {"fp32": 1e-6, "blocks": 0.15, "channels": 0.03}[form]
        assert form == "fp32" or error > 1e-4


def test_each_form_is_timed_at_each_number_of_tokens(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "SECONDS", 0.01)
    times = kernel_choice.time_products(read(fast), (N, K), [1, 5], threads=1)
    assert [(found.form, found.rows) for found in times] == [
        (form, rows) for rows in (1, 5) for form in ("fp32", "blocks", "channels")
    ]
    assert all(found.ms > 0 for found in times)


@pytest.mark.parametrize(("blocks", "channels", "chosen"), [(1, 2, "blocks"), (2, 1, "channels")])
def test_the_faster_prefill_is_compiled_and_loaded(
    fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, channels: int, chosen: Form
) -> None:
    bundle = Path(shutil.copytree(fast, tmp_path / "bundle"))
    max_len = read(bundle).all_of("prefill")[0].shape.max_len
    monkeypatch.setattr(
        kernel_choice, "time_products", lambda *asked: timed(float(blocks), float(channels), max_len)
    )
    compiled = compile_bundle(bundle, silent)
    assert compiled.products is not None
    prefill = f"prefill-{max_len}" + ("-int8" if chosen == "channels" else "")
    (decode,) = (entry.shape.name for entry in read(bundle).all_of("decode"))
    assert compiled.products.chosen == {prefill: chosen, decode: "blocks"}
    assert {Path(graph.source.path).stem for graph in compiled.graphs} == {prefill, decode}
    assert find(bundle, read(bundle)).compiled == compiled
    opened = list[str]()
    monkeypatch.setattr(
        loading, "Session", lambda path, *rest: opened.append(path.name) or session.Session(path, *rest)
    )
    engine = load(bundle, threads=1)
    assert sorted(opened) == sorted(Path(graph.file.path).name for graph in compiled.graphs)
    assert len([step.token for step in engine.stream([5, 9, 11], max_new_tokens=4)]) == 4
    opened.clear()
    load(bundle, threads=1, compiled=False)
    assert sorted(opened) == [f"{decode}.onnx", f"prefill-{max_len}-int8.onnx"]


def without_int8(manifest: Manifest) -> Manifest:
    graphs = {name: e for name, e in manifest.graphs.items() if not e.shape.int8_activations}
    return manifest.model_copy(update={"graphs": graphs, "quantization": Quantization(block_size=32)})


def test_what_would_be_faster_is_told_with_its_option(fast: Path) -> None:
    manifest = read(fast)
    max_len = manifest.all_of("prefill")[0].shape.max_len
    slow, even = timed(2.0, 1.0, max_len), timed(1.0, 1.0, max_len)
    assert kernel_choice.advice(manifest, slow) is None, "the bundle has it"
    told = kernel_choice.advice(without_int8(manifest), slow)
    assert told is not None
    assert "--fast-prefill" in told
    assert "0.50" in told
    assert kernel_choice.advice(without_int8(manifest), even) is None


def test_the_largest_product_is_of_a_layer(fast: Path) -> None:
    manifest = read(fast)
    for entry in manifest.all_of("prefill") + manifest.all_of("decode"):
        graph = onnx.load(fast / entry.file.path, load_external_data=False).graph
        found = kernel_choice.largest_product(graph, manifest.model.vocab_size)
        assert found is not None
        assert found[0] != manifest.model.vocab_size
        assert manifest.model.hidden_size in found


def test_times_are_shown(fast: Path) -> None:
    products = Products(shape=(N, K), times=tuple(timed(1.0, 2.0, 5)), chosen={"decode-12": "blocks"})
    table = product_times.product_table(products)
    assert [list(column.cells) for column in table.columns] == [
        ["fp32", "blocks", "channels"], ["9.000", "1.000", "2.000"], ["9.000", "1.000", "2.000"],
        ["", "decode-12", ""],
    ]  # fmt: skip


def test_what_shows_times_loads_no_torch() -> None:
    code = "import sys, stillgraph.exporter.bundle.inspection; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_form_that_was_not_timed_is_a_mistake() -> None:
    with pytest.raises(StopIteration):
        product_times.ms_of([], "fp32", 1)
