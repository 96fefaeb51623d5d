"""Qualcomm's NPU, by ONNX Runtime's QNN provider: both graphs in one binary that shares their weights.

The NPU computes in fp16, and has weights of few bits as the fp16 numbers that they stand for: its products of
few bits want activations with calibrated scales, and a bundle has none. Off a device its emulator runs the
graphs; that loads no binary of two graphs, so golden.json is run through the sessions which make the binary.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from stillgraph.errors import StillgraphError
from stillgraph.exporter.config import Say
from stillgraph.exporter.ship.python_runtime import PythonRuntime
from stillgraph.exporter.ship.rewrite import rewrite
from stillgraph.exporter.ship.widened import DEQUANTIZE, widen_tables
from stillgraph.golden import Tolerance
from stillgraph.manifest import Manifest

# Qualcomm's list of supported Snapdragon devices: the SoC's number, and the architecture of its NPU.
CHIPS = {"sm8550": (43, 73), "sm8650": (57, 75), "sm8750": (69, 79), "sc8380xp": (60, 73)}
DEFAULT = "sm8650"


class Qnn(PythonRuntime):
    # Of sums in fp16: 0.05 in the emulator behind 1020 tokens, 0.01 behind 256 and fewer.
    tolerance = Tolerance(logits=0.08, near_tie=0.02)

    def __init__(self, chip: str = DEFAULT) -> None:
        super().__init__("qnn", "Qualcomm QNN")
        self.chip = chip

    def for_chip(self, chip: str) -> Qnn:
        if chip not in CHIPS:
            raise StillgraphError("ship", f"--soc {chip} is not known", f"use one of {', '.join(CHIPS)}")
        return Qnn(chip)

    def fill(self, folder: Path, manifest: Manifest, say: Say) -> Manifest:
        model, architecture = CHIPS[self.chip]
        chip = {"name": self.chip, "soc_model": str(model), "htp_arch": str(architecture)}
        (folder / "chip.json").write_text(json.dumps(chip) + "\n", encoding="ascii")
        if manifest.quantization is not None:
            for entry in manifest.graphs.values():
                manifest = rewrite(folder, manifest, entry, _as_numbers)
        return manifest


RUNTIME = Qnn()


def _as_numbers(graph: ir.Graph) -> None:
    """Leave no weight of few bits but those that are numbers once constants are folded."""
    widen_tables(graph)
    read = [
        value for node in graph if node.op_type == DEQUANTIZE for value in node.inputs if value is not None
    ]
    if any(value.producer() is not None for value in read):
        problem = "its embedding has 4 bits, which the NPU has no ops to take apart"
        raise StillgraphError("ship", problem, "export it with --keep embed_tokens=int8")
