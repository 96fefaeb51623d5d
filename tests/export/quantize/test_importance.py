"""Importances against a model that transformers loads and runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.quantize.importance import importance

IDS = torch.arange(2 * 24).reshape(2, 24) % 200


@torch.no_grad()
def test_importances_are_mean_squares_of_what_products_read(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint()
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[str, np.ndarray]()

    def keep(name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[f"{name}.weight"] = np.mean(inputs[0].numpy().reshape(-1, inputs[0].shape[-1]) ** 2, axis=0)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(partial(keep, name))
    model(IDS)
    found = importance(open_checkpoint(str(folder)), IDS)
    assert found.keys() == seen.keys()
    for name, expected in seen.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-7)
