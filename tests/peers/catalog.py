"""Who else runs this model: how each peer is installed, prepared and started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A peer lives in DIR/<name>, an environment of its own, and its models in DIR/models.

    packages: as pip takes them; models: what its script's `prepare` writes; removed: packages that others ask
    for and that break.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    models: tuple[str, ...]
    removed: tuple[str, ...] = ()

    def python(self, folder: Path) -> Path:
        return folder / self.name / "bin" / "python"

    def prepare(self, folder: Path, checkpoint: str) -> list[str]:
        """The command that writes the peer's models from a checkpoint."""
        return [
            str(self.python(folder)),
            str(HERE / self.script),
            "prepare",
            checkpoint,
            str(folder / "models"),
        ]

    def missing(self, folder: Path, model: str) -> str | None:
        """Why one of the peer's models cannot be run, with the remedy; None where it can."""
        remedy = f"python tests/peers/set_up.py {folder} --checkpoint CHECKPOINT --only {self.name}"
        if not self.python(folder).exists():
            return f"not installed: {remedy}"
        return None if (folder / "models" / model).exists() else f"not prepared: {remedy}"


PEERS = (
    Peer(
        "llama",
        "llama.py",
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        ("llama-q4_0.gguf", "llama-q4_0-embd4.gguf", "llama-q8_0.gguf"),
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
        ("genai-b32", "genai-b128"),
    ),
    Peer(
        "openvino",
        "intel.py",
        (TORCH, "openvino==2026.4.1", "optimum-intel[openvino]==2.2.0", "transformers==4.57.6"),
        ("openvino-int4", "openvino-int4-all"),
        removed=("torchvision",),  # built for another torch, and transformers imports it when it is there
    ),
)
