"""Which channels of a decoder are made of like size, and by how much: from the inputs that products meet.

A channel that a norm or the up product makes is smoothed where products alone read it. What a norm gives to
which products is seen while the model runs; that the whole is the same model is seen by running it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.smoothing import SAME, Smoothing
from stillgraph.exporter.streaming import streamed

MOST = 8  # of an exponent: what is 2^16 times as large as its neighbors stays larger


def smoothings(checkpoint: Checkpoint, ids: Tensor, say: Say) -> tuple[Smoothing, ...]:
    """Of a decoder's layers and head, for texts like `ids`, int64 [B, S]; none where the model would be
    another one by them."""
    model = checkpoint.runnable()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decoder, found = checkpoint.family.decoder(model), list[Smoothing]()
    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(partial(_tell, say, f"layer {index + 1} of {len(decoder.layers)}"))
        _Layer(names, found).hook(layer)
    with torch.no_grad(), streamed(checkpoint, model) as embedded:
        hidden = decoder(input_ids=embedded(ids), use_cache=False).last_hidden_state
        if last := _plain_norm(decoder.norm):
            sources = names[id(decoder.norm.weight)], checkpoint.head_name
            found.append(_of(sources, hidden, [checkpoint.head()], _offset(decoder.norm)))
    if _same(checkpoint.smoothed(tuple(found)), ids[:1], hidden[:1], last):
        return tuple(found)
    say("Inputs of products stay as they are: smoothed, the model would be another one.")
    return ()


def _tell(say: Say, line: str, *_: Any) -> None:
    say(f"measuring the inputs of products: {line}")


@dataclass
class _Layer:
    """What makes channels in a layer and what reads them, as it runs."""

    names: Mapping[int, str]  # of parameters, by identity
    found: list[Smoothing]
    _made: list[tuple[nn.Module, Tensor]] = field(default_factory=list)  # norms, and what they gave
    _read: list[tuple[nn.Linear, Tensor]] = field(default_factory=list)  # products, and what they were given

    def hook(self, layer: nn.Module) -> None:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda module, x: self._read.append((module, x[0])))
            elif _plain_norm(module):
                module.register_forward_hook(lambda module, x, y: self._made.append((module, y)))
        layer.register_forward_hook(self._end)

    def _end(self, layer: nn.Module, *_: Any) -> None:
        for norm, output in self._made:
            if readers := [module for module, x in self._read if x is output]:
                self._add(norm.weight, readers, output, _offset(norm))
        inputs = {id(module): x for module, x in self._read}
        for module in layer.modules():
            up, down = getattr(module, "up_proj", None), getattr(module, "down_proj", None)
            if isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and up.bias is None:
                self._add(up.weight, [down], inputs[id(down)], 0.0)
        self._made, self._read = [], []

    def _add(self, maker: Any, readers: list[nn.Linear], x: Tensor, offset: float) -> None:
        weights = [module.weight for module in readers]
        sources = tuple(self.names[id(weight)] for weight in (maker, *weights))
        self.found.append(_of(sources, x, weights, offset))


def _of(sources: tuple[str, ...], x: Tensor, readers: Sequence[Tensor], offset: float) -> Smoothing:
    """Scales by the root of each channel's inputs over its largest weight, and 1 in the mean.

    x: what readers, [N, C] each, are given: [.., C], of which the root of the mean square counts.
    """
    tiny = torch.finfo(torch.float32).tiny
    inputs = x.flatten(0, -2).square().mean(0).sqrt()
    weights = torch.stack([_largest(reader) for reader in readers]).amax(0)
    scales = 0.5 * torch.log2(inputs.clamp_min(tiny) / weights.clamp_min(tiny))
    alive = (inputs > 0) & (weights > 0)
    middle = scales[alive].mean() if bool(alive.any()) else torch.zeros(())
    exponents = torch.where(alive, (scales - middle).round(), 0.0).clamp_(-MOST, MOST)
    return Smoothing(sources, exponents.to(torch.int8), offset)


def _largest(weight: Tensor) -> Tensor:
    """Of each column of [N, C], in any float dtype: fp32 [C]."""
    low, high = torch.aminmax(weight, dim=0)
    return torch.maximum(high, -low).to(torch.float32)


def _plain_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel and nothing else, as an RMSNorm."""
    own = dict(module.named_parameters())
    return set(own) == {"weight"} and own["weight"].dim() < 2


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight: seen by giving it a weight of zeros."""
    weight: Any = norm.weight
    kept, size = weight.data, weight.numel()
    weight.data = torch.zeros(size)
    found = float(type(norm).forward(norm, torch.ones(1, size)).mean().round())  # without its hooks
    weight.data = kept
    return found


def _same(smoothed: Checkpoint, ids: Tensor, hidden: Tensor, last: bool) -> bool:
    """Whether a smoothed model's last state is `hidden` [B, S, C], but for the head's scales where `last`
    says that its smoothing is the last one."""
    model = smoothed.runnable()
    decoder = smoothed.family.decoder(model)
    with torch.no_grad(), streamed(smoothed, model) as embedded:
        found = decoder(input_ids=embedded(ids), use_cache=False).last_hidden_state
    if last:
        found = found * torch.exp2(smoothed.smoothings[-1].exponents.float())
    return bool((found - hidden).abs().max() <= SAME * hidden.abs().max())
