"""A GGUF as a checkpoint's folder in fp32, whose weights lie on no grid.

Dequantized weights are few values a block: a format with the same blocks stores them without loss, and looks
better than it is. So each gets uniform noise of half a step: within that, a GGUF stores the same code.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from stillgraph.exporter.checkpoint import open_checkpoint

BLOCK = 32  # weights that share a scale, or twice as many as do


def write_dithered(gguf: Path, folder: Path, seed: int = 11) -> Path:
    """Write config.json, the tokenizer's files and model.safetensors; equal seeds write equal weights."""
    checkpoint, generator = open_checkpoint(str(gguf)), torch.Generator().manual_seed(seed)
    assert checkpoint.gguf is not None
    tensors = {
        name: dithered(checkpoint.tensor(name), checkpoint.gguf.tensors[name].info.kind, generator)
        for name in sorted(checkpoint.tensors)
    }
    shutil.copytree(checkpoint.folder, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def dithered(weights: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Weights [rows, columns] with noise of up to half a step; weights of kind F32 as they are.

    The step is the range of a block over the number of steps that its kind has: 15 for Q4_1, 255 for Q8_0.
    """
    bits = re.fullmatch(r"I?Q(\d).*", kind)
    if bits is None:
        return weights
    blocks = weights.reshape(-1, BLOCK)
    steps = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / (2 ** int(bits[1]) - 1)
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * steps).reshape(weights.shape)
