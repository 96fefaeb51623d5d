"""NVIDIA's Triton Inference Server: a model repository with a model for each graph.

Its server with ONNX Runtime comes as a container, so nothing is run here: each config.pbtxt is parsed as the
message that Triton publishes, and compared with the manifest. A client sends the cache with each call.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.bundle.build import link
from stillgraph.exporter.config import Say
from stillgraph.exporter.ship.environments import missing, python, variables
from stillgraph.exporter.ship.runtimes import STAGE, Runtime
from stillgraph.manifest import GraphEntry, Manifest
from stillgraph.ports import Port

TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 0
input [
{inputs}
]
output [
{outputs}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "0" }} }}
"""
PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
parsed = text_format.Parse(sys.stdin.read(), ModelConfig())
print(json.dumps(json_format.MessageToDict(parsed, preserving_proto_field_name=True)))
"""


class Triton(Runtime):
    name, title, sources = "triton", "Triton", ("triton",)
    targets = ("portable", "onnxruntime")

    def fill(self, folder: Path, manifest: Manifest, say: Say) -> Manifest:
        interpreter = python(self.name)
        if interpreter is None:
            raise StillgraphError(STAGE, missing(self.name), "run that command")
        for entry in manifest.graphs.values():
            model = folder / "models" / entry.shape.name
            (model / "1").mkdir(parents=True)
            for source, name in ((entry.file.path, "model.onnx"), (manifest.weights.file.path, None)):
                link(folder / source, model / "1" / (name or Path(source).name))
            text = config(entry)
            _check(interpreter, text, entry)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
        return manifest

    def command(self, folder: Path) -> Sequence[str] | str:
        return "its server comes as a container; each config.pbtxt was parsed as Triton's own message"


RUNTIME = Triton()


def config(entry: GraphEntry) -> str:
    """A graph's config.pbtxt. Its shapes are whole, batch included: a static graph takes no other."""
    return CONFIG.format(name=entry.shape.name, inputs=_listed(entry.inputs), outputs=_listed(entry.outputs))


def _listed(ports: Iterable[Port]) -> str:
    return ",\n".join(
        f'  {{ name: "{port.name}" data_type: {TYPES[port.dtype]} dims: {list(port.sizes)} }}'
        for port in ports
    )


def _check(interpreter: str, text: str, entry: GraphEntry) -> None:
    """Raises CheckFailed where Triton's message does not take the text, or has other ports in it."""
    command = [interpreter, "-c", PARSE]
    done = subprocess.run(command, input=text, env=variables(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CheckFailed(STAGE, f"{entry.shape.name}: config.pbtxt is none ({last:.300})", "report this bug")
    parsed = json.loads(done.stdout)
    for side, ports in (("input", entry.inputs), ("output", entry.outputs)):
        found = [(one["name"], one["data_type"], [int(size) for size in one["dims"]]) for one in parsed[side]]
        if found != [(port.name, TYPES[port.dtype], list(port.sizes)) for port in ports]:
            raise CheckFailed(STAGE, f"{entry.shape.name}: config.pbtxt has other {side}s", "report this bug")
