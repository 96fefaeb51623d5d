"""What else runs this model: PyTorch, and the peers with how each is installed, prepared and started.

Peers are never a dependency: each lives in WORK/env/<peer>, an environment of its own, because the exporters
of two of them need transformers 4.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from stillgraph.exporter.bench.contender import Contender, ContenderSource, Making

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
EXTRA = "not installed: pip install 'stillgraph[export]'"
DEMO = HERE.parents[1] / "demo" / "demo_checkpoint"


@dataclass(frozen=True)
class Peer:
    """packages: as pip takes them; models: label of each that `prepare` writes, by file name; removed:
    packages that others ask for and that break; environment: flags for what is compiled, by
    variable; told: more words for `prepare`."""

    name: str
    script: str
    packages: tuple[str, ...]
    models: dict[str, str]
    removed: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    def python(self, work: Path) -> Path:
        return work / "env" / self.name / "bin" / "python"

    def contenders(self, source: ContenderSource) -> list[Contender]:
        folder = DEMO if source.checkpoint == "demo" else Path(source.checkpoint)
        python, file = self.python(source.work), HERE / self.script
        prepare = (str(python), str(file), "prepare", str(folder), str(source.models), *self.told)
        install = f"{Path(sys.executable).name} -m stillgraph.exporter.bench.contenders.install"
        remedy = f"{install} {self.name} --work {source.work}"
        missing = None if python.exists() else f"not installed: {remedy}"
        if not missing and not folder.is_dir():
            missing = f"{source.checkpoint} is not a folder; name one with --model"
        return [
            Contender(
                name=model.removesuffix(".gguf"),
                label=label,
                group=self.name,
                file=file,
                model=str(source.models / model),
                python=python,
                prepare=(Making(source.models / model, prepare),),
                missing=missing,
            )
            for model, label in self.models.items()
        ]


PEERS = (
    Peer(
        "llama",
        "llamacpp.py",
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        {
            "llama-q4_0.gguf": "llama.cpp Q4_0, embedding 8 bits",
            "llama-q4_0-embd4.gguf": "llama.cpp Q4_0, embedding too",
            "llama-q4_k_m.gguf": "llama.cpp Q4_K_M",
            "llama-q4_k_m-im.gguf": "llama.cpp Q4_K_M, importance matrix",
            "llama-iq4_nl.gguf": "llama.cpp IQ4_NL",
            "llama-iq4_nl-im.gguf": "llama.cpp IQ4_NL, importance matrix",
            "llama-q8_0.gguf": "llama.cpp Q8_0",
        },
        # Its AMX kernels crash at their first tile: https://github.com/ggml-org/llama.cpp/issues/20824
        environment=dict.fromkeys(("CFLAGS", "CXXFLAGS"), "-U__AMX_INT8__"),
        told=(sys.executable, "-m", "stillgraph.exporter.quantize.importance"),
    ),
    Peer(
        "genai",
        "genai.py",
        (
            TORCH,
            "onnxruntime-genai==0.11.4",
            "onnxruntime==1.32.0",
            "transformers==4.57.6",
            "onnx",
            "onnx-ir",
        ),
        {
            "genai-b32": "onnxruntime-genai int4, blocks of 32",
            "genai-b128": "onnxruntime-genai int4, blocks of 128",
        },
    ),
    Peer(
        "openvino",
        "intel.py",
        (TORCH, "openvino==2026.4.1", "optimum-intel[openvino]==2.2.0", "transformers==4.57.6"),
        {
            "openvino-int4": "OpenVINO int4, embedding 8 bits",
            "openvino-int4-awq": "OpenVINO int4, AWQ and scale estimation",
            "openvino-int4-all": "OpenVINO int4, embedding too",
        },
        removed=("torchvision",),  # built for another torch, and transformers imports it when it is there
    ),
)


def find(source: ContenderSource) -> list[Contender]:
    """PyTorch in fp32 and bf16, then every model of every peer, those that are not installed too."""
    missing = None if find_spec("torch") and find_spec("transformers") else EXTRA
    eager = [
        Contender(
            name=name,
            label=label,
            group="torch" if exact else "torch-bf16",
            file=HERE / "eager.py",
            model=source.checkpoint,
            options={"dtype": dtype, "sha256": source.checkpoint_sha256},
            missing=missing,
            exact=exact,
            sees=True,
        )
        for name, label, dtype, exact in (
            ("torch", "PyTorch eager fp32", "float32", True),
            ("torch-bf16", "PyTorch eager bf16", "bfloat16", False),
        )
    ]
    return eager + [contender for peer in PEERS for contender in peer.contenders(source)]
