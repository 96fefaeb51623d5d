"""A decoder as another exporter would write it: transformers' own model over a DynamicCache, by torch.onnx.

It shares no code with the export. Its window, and where positions begin in a call that continues a cache, are
initializers, so that a mistake takes no second export.
Shapes: S new tokens, T tokens before them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache


class Growing(torch.nn.Module):
    """From ids, mask, positions, and keys and values in turn, to logits and the longer keys and values."""

    def __init__(self, model: Any, window: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("window", torch.tensor(window))
        self.register_buffer("restarts", torch.tensor(0))  # 1: positions of every call begin at 0

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        cache = DynamicCache()
        for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(*pair, layer)
        slots = torch.arange(attention_mask.shape[1])
        rows = position_ids[0, :, None]
        causal = (slots <= rows) & (attention_mask[0] == 1)
        near = causal & (slots > rows - self.window)
        masks = [torch.where(seen, 0.0, -torch.inf)[None, None] for seen in (causal, near)]
        output = self.model(
            input_ids,
            attention_mask=dict(zip(("full_attention", "sliding_attention"), masks, strict=True)),
            position_ids=position_ids - self.restarts * position_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def export_growing(checkpoint: Path, path: Path) -> None:
    """Write the graph, with the names that exporters of transformers use."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    config = model.config
    sizes = 1, config.num_key_value_heads, 5, config.head_dim
    past = [torch.zeros(sizes) for _ in range(2 * config.num_hidden_layers)]  # one tensor would be one input
    ids = torch.zeros(1, 3, dtype=torch.int64)
    new, old = Dim("new_tokens"), Dim("past_tokens")
    layers = range(config.num_hidden_layers)
    names = [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    program = torch.onnx.export(
        Growing(model, config.sliding_window).eval(),
        (ids, torch.ones(1, 8, dtype=torch.int64), ids + torch.arange(5, 8), *past),
        dynamo=True,
        optimize=False,
        verbose=False,
        dynamic_shapes=({1: new}, {1: Dim("total_tokens")}, {1: new}, tuple({2: old} for _ in past)),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
    )
    assert program is not None
    program.save(path)


def changed(graph: Path, path: Path, **values: int) -> Path:
    """A copy with other initializers: `window`, `restarts`."""
    model = onnx.load(graph)
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.array(values.pop(tensor.name)), tensor.name))
    assert not values
    onnx.save(model, path)
    return path


def merged(graph: Path, path: Path) -> Path:
    """A copy that takes `use_cache_branch`, and whose logits are no numbers where it is wrong."""
    model = onnx.load(graph)
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    model.graph.input.append(flag)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "plain"
    nodes = [
        helper.make_node("Shape", ["past_key_values.0.key"], ["length"], start=2, end=3),
        helper.make_node("Greater", ["length", "none"], ["continues"]),
        helper.make_node("Equal", ["continues", "use_cache_branch"], ["right"]),
        helper.make_node("Where", ["right", "plain", "nan"], ["logits"]),
    ]
    model.graph.node.extend(nodes)
    constants = {"none": np.array([0]), "nan": np.array(np.nan, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, path)
    return path


def in_int8(graph: Path, path: Path) -> Path:
    """A copy whose matrices are int8 codes with one scale each, as written by DequantizeLinear."""
    model = onnx.load(graph)
    for tensor in list(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.ndim == 2 and values.dtype == np.float32:
            scale = np.float32(np.abs(values).max() / 127)
            codes = np.round(values / scale).astype(np.int8)
            model.graph.initializer.remove(tensor)
            parts = (codes, f"{tensor.name} codes"), (scale, f"{tensor.name} scale")
            model.graph.initializer.extend(numpy_helper.from_array(*part) for part in parts)
            names = [name for _, name in parts]
            model.graph.node.insert(0, helper.make_node("DequantizeLinear", names, [tensor.name]))
    onnx.save(model, path)
    return path
