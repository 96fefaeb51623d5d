"""What four bits cost each weight of a decoder, and which of them get eight.

A weight W stored as W + D changes the output of its product at token t by D x_t. With g_t the gradient of the
log-likelihood of a token drawn from the model itself, half the mean of (g_t D x_t)^2 is the divergence that
this makes, to second order and with errors of tokens taken for independent (the Fisher matrix's quadratic
form). One pass forward and one back, layer by layer, give it for every weight. Shapes: B texts of S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.few_bits import block_bits
from stillgraph.exporter.quantize.calibrate import layer_products
from stillgraph.exporter.quantize.rounding import Format
from stillgraph.exporter.streaming import empty, streamed

GUESSES = 0  # seed of the tokens drawn from the model's odds
Stored = Callable[[str], Tensor]  # the numbers [N, K] that a weight would have
TOKENS = 64  # whose logits are in memory at once


@dataclass(frozen=True)
class Unit:
    """Weights that are one product, for they have one input: they get the same bits.

    cost: of storing it as it was measured, nats a token; numbers: how many it has.
    """

    names: tuple[str, ...]
    numbers: int
    columns: int
    cost: float


def sensitivity(checkpoint: Checkpoint, stored: Stored, ids: Tensor, say: Say) -> list[Unit]:
    """Every product of the decoder's layers, and what storing it so would cost. ids: int64 [B, S]."""
    model = checkpoint.build("sdpa")
    decoder, found = checkpoint.family.decoder(model), list[Unit]()
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    with streamed(checkpoint, model) as embedded, torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
            for layer in decoder.layers
        ]
        say("forward")
        last: list[Tensor] = []
        hooks.append(decoder.layers[-1].register_forward_hook(lambda _, inputs, output: last.append(output)))
        decoder(input_ids=embedded(ids), use_cache=False)
        for hook in hooks:
            hook.remove()
        gradient = _of_loss(checkpoint, decoder, last[0])
        names = layer_products(checkpoint, model)
        for index in reversed(range(len(names))):
            say(f"back to layer {index + 1} of {len(names)}")
            units, gradient = _back(calls.pop(), names[index], gradient, stored)
            found += units
    return found


def _of_loss(checkpoint: Checkpoint, decoder: Any, hidden: Tensor) -> Tensor:
    """The gradient [B, S, hidden] of the summed losses of drawn tokens, by what the last layer returns."""
    head = checkpoint.head().to(torch.float32)
    generator = torch.Generator().manual_seed(GUESSES)
    gradients = list[Tensor]()
    for part in torch.split(hidden.flatten(0, 1), TOKENS):
        with torch.enable_grad():
            start = part.detach().requires_grad_()
            logits = functional.linear(decoder.norm(start), head)
            logits = checkpoint.family.logits(decoder.config, logits)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
            loss = functional.cross_entropy(logits, drawn, reduction="sum")
            gradients += torch.autograd.grad(loss, start)
    return torch.cat(gradients).view(hidden.shape)


def _back(
    call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]],
    products: Mapping[str, nn.Linear],
    gradient: Tensor,
    stored: Stored,
) -> tuple[list[Unit], Tensor]:
    """A layer's units, and the gradient by its input. call: the layer, and what it was called with."""
    layer, inputs, options = call
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # input, output, what rounding adds to the output

    def keep(name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        seen[name] = x, output, functional.linear(x.detach(), stored(name) - module.weight)

    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: keep(name, m, x[0], y))
        for name, module in products.items()
    ]
    with torch.enable_grad():
        start = inputs[0].detach().requires_grad_()
        output = layer(start, *inputs[1:], **options)
        wanted = [start, *(output for _, output, _ in seen.values())]
        back, *gradients = torch.autograd.grad(output, wanted, gradient)
    for hook in hooks:
        hook.remove()
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for (name, (x, _, added)), g in zip(seen.items(), gradients, strict=True):
        groups.setdefault(id(x), []).append((name, (g * added).sum(-1)))
    units = [_unit(products, group) for group in groups.values()]
    empty(layer)
    return units, back


def _unit(products: Mapping[str, nn.Linear], group: list[tuple[str, Tensor]]) -> Unit:
    """group: names of weights, and what rounding each adds to the loss of each token [B, S]."""
    names = tuple(name for name, _ in group)
    cost = sum(float(added.square().mean()) for _, added in group) / 2
    shapes = [products[name].weight.shape for name in names]
    return Unit(names, sum(rows * columns for rows, columns in shapes), shapes[0][1], cost)


def bits_of(form: Format, columns: int) -> float:
    """Bits a weight of rows of `columns`: codes, filled up to whole blocks, scales and zero points."""
    return form.blocks(columns) * block_bits(form.bits, form.block, form.symmetric) / columns


def choose(units: list[Unit], few: Format, many: Format, budget: float) -> tuple[list[Unit], float]:
    """The units that are stored in `many` for `budget` bits a weight over all units, and the bits they take.

    By what they would cost in `few` for each bit that `many` needs more, the dearest first; one that does not
    fit is left out.
    """
    numbers = sum(unit.numbers for unit in units)
    taken = sum(unit.numbers * bits_of(few, unit.columns) for unit in units)
    chosen = []

    def more(unit: Unit) -> float:
        return unit.numbers * (bits_of(many, unit.columns) - bits_of(few, unit.columns))

    for unit in sorted(units, key=lambda unit: unit.cost / more(unit), reverse=True):
        if taken + more(unit) <= budget * numbers:
            taken += more(unit)
            chosen.append(unit)
    return chosen, taken / numbers
