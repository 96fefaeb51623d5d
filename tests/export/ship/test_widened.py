"""Weights of few bits and of fp16 in plain ops compute what they computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from stillgraph.exporter.ir.simplify import random_inputs
from stillgraph.exporter.ort import difference, open_graph, run
from stillgraph.exporter.ship.widened import widen_blocks, widen_halves, widen_tables
from stillgraph.manifest import GraphEntry, read

FORMS: dict[str, dict[str, Any]] = {
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4 symmetric": {"precision": "int4", "asymmetric": False},
    "fp16": {"precision": "fp16"},
}


def compared(before: Path, after: Path, entry: GraphEntry) -> float:
    """The largest difference of any output, over its largest magnitude."""
    found = []
    for path in (before, after):
        session = open_graph(path, optimized=False)
        found.append(run(session, random_inputs(session, 0, np.empty), entry.aliases))
    return max(difference(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_same(tiny_bundle: Callable[..., Path], tmp_path: Path, form: str, role: str) -> None:
    own = Path(shutil.copytree(tiny_bundle(**FORMS[form]), tmp_path / "own"))
    entry = read(own).graph(role)
    assert entry is not None
    graph = ir.load(own / entry.file.path)
    assert (widen_blocks(graph.graph) if form != "fp16" else widen_halves(graph.graph)) > 0
    common.RemoveUnusedNodesPass()(graph)
    ir.save(graph, own / "plain.onnx", external_data="plain.data")
    left = {value.dtype for value in graph.graph.initializers.values()}
    assert not left & {ir.DataType.INT4, ir.DataType.UINT4}
    if form == "fp16":
        assert ir.DataType.FLOAT16 not in left
    assert not [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    found = compared(own / entry.file.path, own / "plain.onnx", entry)
    assert found < (1e-2 if form == "fp16" else 1e-6)  # inputs of products are no longer rounded


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_whole_table_has_the_same_rows(
    tiny_bundle: Callable[..., Path], tmp_path: Path, role: str, tied: bool
) -> None:
    own = Path(shutil.copytree(tiny_bundle(precision="int8", tie_word_embeddings=tied), tmp_path / "own"))
    entry = read(own).graph(role)
    assert entry is not None
    graph = ir.load(own / entry.file.path)
    assert widen_tables(graph.graph) == 1
    constants = graph.graph.initializers
    dequantized = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    assert all(value.name in constants for node in dequantized for value in node.inputs if value is not None)
    ir.save(graph, own / "whole.onnx")
    assert compared(own / entry.file.path, own / "whole.onnx", entry) == 0
