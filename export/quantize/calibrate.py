"""One pass of a model over a text, layer by layer, that rounds each weight for the inputs it meets.

A layer's weights come into memory with its turn, are rounded one after the other, each for inputs that all
those before it have made, and leave again. The same texts run beside it with no weight rounded, so that each
weight can make up for what has become of its inputs. transformers' own code runs; what is done here hangs on
its modules, so that no family has to be known. Shapes: B texts of S tokens, N rows and K columns of a weight.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.quantize.rounded import Rounded
from stillgraph.exporter.quantize.rounding import Format
from stillgraph.exporter.quantize.second_order import Moments, compensated, quantize_for
from stillgraph.exporter.streaming import NOTHING, streamed

Forms = Mapping[str, Format]  # of each tensor of the checkpoint that is to be rounded


@torch.no_grad()
def calibrate(checkpoint: Checkpoint, forms: Forms, ids: Tensor, rounded: Rounded, say: Say) -> None:
    """Round the weights of the decoder's layers that `forms` names, and add them to `rounded`.

    ids: int64 [B, S]. A layer whose weights are all in `rounded` is only run. Memory is that of the largest
    layer in fp32, twice of its inputs and of its largest product's moments.
    """
    model = checkpoint.runnable()
    layers = checkpoint.family.decoder(model).layers
    clock = _Clock(len(layers), say)
    with streamed(checkpoint, model) as embedded:
        for layer, found in zip(layers, layer_products(checkpoint, model), strict=True):
            wanted = {name: module for name, module in found.items() if name in forms}
            _Layer(wanted, forms, rounded, clock).hook(layer)
        # The first half of the rows is never rounded, the second is the same texts with all that is.
        checkpoint.family.decoder(model)(input_ids=embedded(torch.cat([ids, ids])), use_cache=False)


def products(checkpoint: Checkpoint) -> set[str]:
    """The names of the weights of all products in a decoder's layers."""
    return {name for layer in layer_products(checkpoint, checkpoint.runnable()) for name in layer}


def layer_products(checkpoint: Checkpoint, model: nn.Module) -> list[dict[str, nn.Linear]]:
    """Of each layer, by the names of their weights."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {names[id(module.weight)]: module for module in layer.modules() if isinstance(module, nn.Linear)}
        for layer in checkpoint.family.decoder(model).layers
    ]


@dataclass
class _Clock:
    """Says how far the pass is, and from the layers behind it how long the rest will take."""

    layers: int
    say: Say
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        line = f"calibrating layer {self.done + 1} of {self.layers}"
        if self.done:
            seconds = (time.monotonic() - self.began) / self.done * (self.layers - self.done)
            line += f", {seconds / 60:.0f} minutes left" if seconds >= 90 else f", {seconds:.0f} s left"
        self.say(line)
        self.done += 1


@dataclass
class _Layer:
    """One decoder layer's products, by the names of their weights."""

    products: Mapping[str, nn.Linear]
    forms: Forms
    rounded: Rounded
    clock: _Clock
    _input: Tensor = NOTHING
    _moments: Moments | None = None

    def hook(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self._begin)
        for name, module in self.products.items():
            module.forward = partial(self._product, name, module)  # type: ignore[method-assign]
        layer.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.clock.tick()

    def _product(self, name: str, module: nn.Linear, inputs: Tensor) -> Tensor:
        """Of inputs [2 B, S, K]: the first half by the weight as it is, the second by the rounded one."""
        form, weight, bias = self.forms[name], module.weight, module.bias
        found = self.rounded.get(name, form)
        exact, met = (half.flatten(0, -2) for half in inputs.chunk(2))
        if found is None:
            moments = self._moments_of(inputs, met)
            found = quantize_for(compensated(weight, moments, exact, met), moments, form)
            self.rounded.add(name, found)
        products = torch.empty(*inputs.shape[:-1], len(weight))
        # Each half is written where it belongs: joining them would copy all, half a GB of a wide product.
        halves = products.view(-1, len(weight)).chunk(2)
        for half, of, by in zip(halves, (exact, met), (weight, found.dequantize()), strict=True):
            if bias is None:
                torch.mm(of, by.T, out=half)
            else:
                torch.addmm(bias, of, by.T, out=half)
        return products

    def _moments_of(self, inputs: Tensor, met: Tensor) -> Moments:
        """Of inputs that rounding has changed; once for all products that take the same ones."""
        if inputs is not self._input or self._moments is None:
            self._input, self._moments = inputs, Moments.of(met)
        return self._moments

    def _end(self, *_: Any) -> None:
        self._input, self._moments = NOTHING, None
        self.rounded.flush()
