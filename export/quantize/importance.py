"""What importance matrices hold: the mean square of each input of each product, over a model's own samples.

    python -m stillgraph.exporter.quantize.importance CHECKPOINT FILE.npz

is for others' quantizers, which a benchmark compares with: they are to know as much of the model's inputs.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillgraph.exporter.checkpoint import Checkpoint, open_checkpoint
from stillgraph.exporter.quantize.calibrate import layer_products
from stillgraph.exporter.quantize.samples import own_texts
from stillgraph.exporter.streaming import streamed

TEXTS, LENGTH = 128, 128  # as many tokens as an int4 export takes


@torch.no_grad()
def importance(checkpoint: Checkpoint, ids: Tensor) -> dict[str, np.ndarray]:
    """Float32 [K] by the name of each weight [N, K] of the decoder's layers. ids: int64 [B, S]."""
    model, found = checkpoint.runnable(), dict[str, np.ndarray]()

    def keep(name: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0].flatten(0, -2).square().mean(0).numpy()

    for products in layer_products(checkpoint, model):
        for name, module in products.items():
            module.register_forward_pre_hook(partial(keep, name))
    with streamed(checkpoint, model) as embedded:
        checkpoint.family.decoder(model)(input_ids=embedded(ids), use_cache=False)
    return found


def main(model: str, target: Path) -> None:
    checkpoint = open_checkpoint(model)
    found = importance(checkpoint, own_texts(checkpoint, TEXTS, LENGTH, lambda line: None))
    beside = target.with_suffix(".part.npz")  # a file that exists is complete
    np.savez(beside, **found)  # type: ignore[arg-type]
    beside.replace(target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
