"""Qualcomm's NPU, by ONNX Runtime's QNN provider: both graphs in one binary that shares their weights.

The NPU computes in fp16. Off a device its emulator runs the graphs; that loads no binary of two graphs, so
the sessions which make the binary are those that golden.json is run through.
"""

from __future__ import annotations

import json
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.config import Say
from stillgraph.exporter.ship.python_runtime import PythonRuntime
from stillgraph.golden import Tolerance
from stillgraph.manifest import Manifest

# Qualcomm's list of supported Snapdragon devices: the SoC's number, and the architecture of its NPU.
CHIPS = {"sm8550": (43, 73), "sm8650": (57, 75), "sm8750": (69, 79), "sc8380xp": (60, 73)}
DEFAULT = "sm8650"
QUANTIZED = (
    "its NPU wants activations with calibrated scales beside weights of few bits, and a bundle has none"
)


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

    def refuses(self, manifest: Manifest) -> str | None:
        if manifest.quantization is not None:
            return QUANTIZED
        return super().refuses(manifest)

    def fill(self, folder: Path, manifest: Manifest, say: Say) -> Manifest:
        model, architecture = CHIPS[self.chip]
        chip = {"name": self.chip, "soc_model": str(model), "htp_arch": str(architecture)}
        (folder / "chip.json").write_text(json.dumps(chip) + "\n", encoding="ascii")
        return manifest


RUNTIME = Qnn()
