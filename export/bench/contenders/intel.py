"""OpenVINO's runtime as one contender; and the int4 models that optimum-intel writes.

python intel.py prepare CHECKPOINT MODELS    # a folder openvino-... for each of FORMS
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13
from transformers4 import folder_for_transformers4

# `int4` is the usual form, with an embedding of 8 bits; `int4-awq` is made for texts that its own tool has
# the model write; `int4-all` is symmetric and 4 bits throughout
FORMS = {
    "int4": [],
    "int4-awq": ["--awq", "--scale-estimation", "--dataset", "auto"],
    "int4-all": ["--sym", "--all-layers"],
}


class Intel:
    def __init__(self, request: Any) -> None:
        core = openvino.Core()
        model = core.read_model(Path(request.model) / "openvino_model.xml")
        last_logits_alone(model)
        hints = {"INFERENCE_NUM_THREADS": request.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.request = core.compile_model(model, "CPU", hints).create_infer_request()
        self.inputs = {name for port in model.inputs for name in port.get_names()}
        self.swap_seconds = 0.0
        self.facts = {
            "versions": {name: version(name) for name in ("openvino", "optimum-intel")},
            "weights_mb": (Path(request.model) / "openvino_model.bin").stat().st_size / 1e6,
        }

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        self.request.reset_state()
        fed, seen = ids, 0
        for _ in range(count):
            token = int(self._feed(fed, seen).argmax())
            yield token
            fed, seen = [token], seen + len(fed)

    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        self.request.reset_state()
        yield self._feed(ids[: first + 1], 0)
        for seen in range(first + 1, len(ids)):
            yield self._feed(ids[seen : seen + 1], seen)

    def _feed(self, ids: list[int], seen: int) -> np.ndarray:
        """Logits [V] after ids that follow `seen` others; the next call overwrites them."""
        length = seen + len(ids)
        feed = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, length), np.int64)}
        feed["position_ids"] = np.arange(seen, length, dtype=np.int64)[None]
        feed["beam_idx"] = np.zeros(1, np.int32)
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        self.request.infer(feed, share_inputs=True)
        found: np.ndarray = self.request.get_tensor("logits").data[0, -1]
        return found


def last_logits_alone(model: openvino.Model) -> None:
    """Slice the head's input to its last position, as openvino-genai does, so that a prompt pays for one."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden, axes = node.input_value(0), [1]
    last = opset13.slice(hidden, np.array([-1]), np.array([2**31 - 1]), np.array([1]), np.array(axes))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def prepare(checkpoint: Path, models: Path) -> None:
    source = folder_for_transformers4(checkpoint, models)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rows = [config[name] for name in ("hidden_size", "intermediate_size")]
    group = str(next(size for size in (128, 64, 32) if not any(row % size for row in rows)))
    for form, options in FORMS.items():
        made = models / f"openvino-{form}"  # a folder that exists is complete
        if made.exists():
            continue
        beside = made.with_suffix(".part")
        export = [
            sys.executable,
            "-m",
            "optimum.commands.optimum_cli",
            "export",
            "openvino",
            "-m",
            str(source),
        ]
        export += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", group]
        subprocess.run(
            [*export, "--ratio", "1.0", *options, str(beside)], check=True, stdout=subprocess.DEVNULL
        )
        beside.replace(made)


def open_contender(request: Any) -> Intel:
    return Intel(request)


if __name__ == "__main__":
    prepare(Path(sys.argv[2]), Path(sys.argv[3]))
