"""Write what every lane is given: graphs of products with their weights, demo bundles, prompts.

Made natively, where torch is; probe.py runs it where it is not. Layout of the folder: products/CASE/,
full-range/, rounding/FORM/, bundles/NAME/, prompts.json.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stillgraph import load
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.config import decode_shape, prefill_shape, request, with_one_slack
from stillgraph.exporter.demo.stories import held_out
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.manifest import Precision
from tests.cpus import products
from tests.cpus.rounding import BLOCK

CHUNK, CTX = 128, 1024
# Tokens of a prompt: 32 more pass the window of 32 from 20, and the chunk from 110; 300 are three chunks.
LENGTHS = (5, 20, 110, 150, 300)


@dataclass(frozen=True)
class Bundle:
    """One way to store the demo. name: as in the table, and the bundle's folder."""

    name: str
    precision: Precision
    fast: bool = False


BUNDLES = (
    Bundle("fp32", "fp32"),
    Bundle("int8", "int8"),
    Bundle("int4", "int4"),
    Bundle("int4-fast", "int4", fast=True),
)


def write(folder: Path) -> None:
    """All of it, made anew: what was there is of the code as it was."""
    shutil.rmtree(folder, ignore_errors=True)
    for case in products.cases():
        products.build(case, folder / "products" / case.product.replace(" ", "-") / case.name)
    products.build(products.full_range(), folder / "full-range")
    _write_rounding(folder / "rounding")
    for bundle in BUNDLES:
        _export(bundle, folder / "bundles" / bundle.name)
    (folder / "prompts.json").write_text(json.dumps(_prompts(folder / "bundles" / "fp32")), encoding="ascii")


def _write_rounding(folder: Path) -> None:
    """Products of activations that 8 bits cannot hold, which tell how they are rounded."""
    rng = np.random.default_rng(0)
    for precision, bits in (("int8", 8), ("int4", 4)):
        case = products.Case("blocked", Format(bits, BLOCK), 4 * BLOCK)
        weights = torch.from_numpy(rng.standard_normal((case.entries, case.columns)).astype(np.float32))
        feeds = rng.standard_normal((1, case.rows, case.columns)).astype(np.float32)
        products.build(case, folder / precision, quantize(weights / 64, case.form), feeds)


def _export(bundle: Bundle, out: Path) -> None:
    config = request(
        model="demo",
        target="onnxruntime",
        precision=bundle.precision,
        batch=1,
        fast_prefill=bundle.fast,
        out=out,
    )
    shapes = with_one_slack([prefill_shape(config, CHUNK, CTX), decode_shape(config, CTX)])
    export(config, shapes, replace=True, say=lambda line: None)


def _prompts(bundle: Path) -> list[list[int]]:
    """The beginnings of stories that the demo has not seen."""
    engine, stories = load(bundle), held_out(13, (300, 400))
    return [engine.ids(next(stories).text)[:length] for length in LENGTHS]
