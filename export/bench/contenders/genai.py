"""onnxruntime-genai as one contender; and the int4 models that its own builder writes.

python genai.py prepare CHECKPOINT MODELS    # genai-b32 and genai-b128 folders
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
import onnxruntime_genai as og
from transformers4 import folder_for_transformers4, folder_mb

# 32 is the default of the builder. Its shared_embeddings would save 1.2 GB of disk, but in 0.11.4 the graph
# then names a zero point that it does not store, and does not load.
BLOCKS = (32, 128)


class Genai:
    def __init__(self, request: Any) -> None:
        config = og.Config(request.model)
        config.overlay(json.dumps(self._options(request)))
        self.model, self.ctx = og.Model(config), request.ctx
        packages = ("onnxruntime-genai", "onnxruntime")
        self.swap_seconds = 0.0
        self.facts = {
            "versions": {name: version(name) for name in packages},
            "weights_mb": folder_mb(Path(request.model)),
        }

    @staticmethod
    def _options(request: Any) -> dict[str, object]:
        """No token ends a text: random weights choose stop tokens like any other."""
        session = {"intra_op_num_threads": request.threads}
        return {"model": {"eos_token_id": [-1], "decoder": {"session_options": session}}}

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        generator = self._generator()
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        generator, start = self._generator(), 0
        for end in range(first + 1, len(ids) + 1):
            generator.append_tokens(ids[start:end])
            start = end
            yield np.ascontiguousarray(generator.get_output("logits")[0, -1], np.float32)

    def _generator(self) -> og.Generator:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.ctx, do_sample=False)
        return og.Generator(self.model, params)


def prepare(checkpoint: Path, models: Path) -> None:
    source = folder_for_transformers4(checkpoint, models)
    for block in BLOCKS:
        beside = models / f"genai-b{block}.part"  # a folder that exists is complete
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source)]
        build += ["-o", str(beside), "-c", str(models / "cache"), "-p", "int4", "-e", "cpu"]
        options = [f"int4_block_size={block}", "int4_accuracy_level=4"]
        subprocess.run([*build, "--extra_options", *options], check=True, stdout=subprocess.DEVNULL)
        beside.replace(models / f"genai-b{block}")


def open_contender(request: Any) -> Genai:
    return Genai(request)


if __name__ == "__main__":
    prepare(Path(sys.argv[2]), Path(sys.argv[3]))
