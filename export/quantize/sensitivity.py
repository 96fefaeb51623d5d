"""What rounding costs each product of a decoder, and which of them are given more for it.

A weight W stored as W + D changes the output of its product at token t by e_t = D x_t, and rounded inputs
change it in the same place. With g_t the gradient of the log-likelihood of a token drawn from the model
itself, half the mean of (g_t e_t)^2 is the divergence that this makes, to second order and with errors of
tokens taken for independent (the Fisher matrix's quadratic form). One pass forward and one back, layer by
layer, give it for every product. Shapes: B texts of S tokens, N rows and K columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.config import Say
from stillgraph.exporter.few_bits import block_bits
from stillgraph.exporter.quantize.calibrate import layer_products
from stillgraph.exporter.quantize.int8_rows import FIRST, is_finer
from stillgraph.exporter.quantize.rounding import Format, quantize
from stillgraph.exporter.quantize.samples import drawn
from stillgraph.exporter.streaming import empty, streamed

GUESSES = 0  # seed of the tokens drawn from the model's odds
# What rounding adds to a product [B, S, N], of a weight's name, its inputs [B, S, K] and its numbers [N, K].
Added = Callable[[str, Tensor, Tensor], Tensor]
LARGEST = 127  # the code of a row's largest input
TOKENS = 64  # whose logits are in memory at once


@dataclass(frozen=True)
class Cost:
    """Of rounding a product as it was measured, in nats a token. numbers: how many its weight has."""

    name: str
    numbers: int
    columns: int
    nats: float


def sensitivity(checkpoint: Checkpoint, kinds: Sequence[Added], ids: Tensor, say: Say) -> list[list[Cost]]:
    """What each kind of rounding costs each product of the decoder's layers. ids: int64 [B, S]."""
    model = checkpoint.runnable()
    decoder, found = checkpoint.family.decoder(model), [list[Cost]() for _ in kinds]
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
            costs, gradient = _back(calls.pop(), names[index], gradient, kinds)
            for known, more in zip(found, costs, strict=True):
                known += more
    return found


def _of_loss(checkpoint: Checkpoint, decoder: Any, hidden: Tensor) -> Tensor:
    """The gradient [B, S, hidden] of the summed losses of drawn tokens, by what the last layer returns."""
    head = checkpoint.head().to(torch.float32)
    generator = torch.Generator().manual_seed(GUESSES)
    sums = torch.empty(TOKENS, len(head), dtype=torch.float64)
    gradients = list[Tensor]()
    for part in torch.split(hidden.flatten(0, 1), TOKENS):
        with torch.enable_grad():
            start = part.detach().requires_grad_()
            logits = checkpoint.family.logits(decoder.config, functional.linear(decoder.norm(start), head))
        by_logits = logits.detach().softmax(-1)  # and 1 less for the token that is drawn
        at = torch.rand(len(part), 1, generator=generator, dtype=torch.float64)
        token = drawn(by_logits, at, sums)
        by_logits.scatter_add_(1, token, torch.full_like(token, -1, dtype=by_logits.dtype))
        gradients += torch.autograd.grad(logits, start, by_logits)
    return torch.cat(gradients).view(hidden.shape)


def _back(
    call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]],
    products: Mapping[str, nn.Linear],
    gradient: Tensor,
    kinds: Sequence[Added],
) -> tuple[list[list[Cost]], Tensor]:
    """What a layer's products cost, and the gradient by its input. call: the layer, and what it is given."""
    layer, inputs, options = call
    seen: dict[str, tuple[Tensor, list[Tensor]]] = {}  # output, and what each kind adds to it

    def keep(name: str, module: nn.Linear, x: Tensor, output: Tensor) -> None:
        seen[name] = output, [added(name, x.detach(), module.weight.detach()) for added in kinds]

    hooks = [
        module.register_forward_hook(lambda m, x, y, name=name: keep(name, m, x[0], y))
        for name, module in products.items()
    ]
    with torch.enable_grad():
        start = inputs[0].detach().requires_grad_()
        output = layer(start, *inputs[1:], **options)
        wanted = [start, *(output for output, _ in seen.values())]
        back, *gradients = torch.autograd.grad(output, wanted, gradient)
    for hook in hooks:
        hook.remove()
    known = [(name, errors, g) for (name, (_, errors)), g in zip(seen.items(), gradients, strict=True)]
    costs = [
        [_cost(name, products[name].weight, errors[kind], g) for name, errors, g in known]
        for kind in range(len(kinds))
    ]
    empty(layer)
    return costs, back


def _cost(name: str, weight: Tensor, error: Tensor, gradient: Tensor) -> Cost:
    nats = float((gradient * error).sum(-1).square().mean()) / 2
    return Cost(name, weight.numel(), weight.shape[1], nats)


def of_nearest(form: Format) -> Added:
    """What rounding weights to a form adds, each to its nearest number: what `quantize_for` makes of them has
    a smaller error for the inputs it is made for, and hardly for others."""

    def added(_: str, x: Tensor, weight: Tensor) -> Tensor:
        importance = x.flatten(0, -2).square().mean(0).sqrt_()
        return functional.linear(x, quantize(weight, form, importance).dequantize() - weight)

    return added


def of_int8_rows(name: str, x: Tensor, weight: Tensor) -> Tensor:
    """What `int8_product` adds: inputs in 8 bits, one scale a token, and weights, one a channel. x: [B, S, K]
    of texts that are calls of their own."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / LARGEST
    rounded, stored = (x / scale).round_() * scale, quantize(weight, Format.channel(weight.shape[1]))
    if is_finer(*weight.shape):
        rounded[..., :FIRST, :] = x[..., :FIRST, :]
    return functional.linear(rounded, stored.dequantize()) - functional.linear(x, weight)


def bits_of(form: Format, columns: int) -> float:
    """Bits a weight of rows of `columns`: codes, filled up to whole blocks, scales and zero points."""
    return form.blocks(columns) * block_bits(form.bits, form.block, form.symmetric) / columns


def choose(
    costs: list[Cost], few: Format, many: Format, budget: float | None, kl: float | None = None
) -> tuple[list[Cost], float]:
    """The weights that are stored in `many`, and the bits a number that all take then: for `budget` bits a
    number, or for no more than `kl` nats of all that `few` costs.

    By what they would cost in `few` for each bit that `many` needs more, the dearest first; one that does not
    fit is left out.
    """
    numbers, left = sum(cost.numbers for cost in costs), sum(cost.nats for cost in costs)
    taken = sum(cost.numbers * bits_of(few, cost.columns) for cost in costs)
    most = math.inf if budget is None else budget * numbers
    chosen = list[Cost]()

    def more(cost: Cost) -> float:
        return cost.numbers * (bits_of(many, cost.columns) - bits_of(few, cost.columns))

    for cost in sorted(costs, key=lambda cost: cost.nats / more(cost), reverse=True):
        if kl is not None and left <= kl:
            break
        if taken + more(cost) <= most:
            taken, left = taken + more(cost), left - cost.nats
            chosen.append(cost)
    return chosen, taken / numbers


def dearest(costs: list[Cost], kl: float) -> list[Cost]:
    """Those without which the others cost no more than `kl` nats; by nats a number, which is by time."""
    left, found = sum(cost.nats for cost in costs), list[Cost]()
    for cost in sorted(costs, key=lambda cost: cost.nats / cost.numbers, reverse=True):
        if left <= kl:
            break
        left -= cost.nats
        found.append(cost)
    return found
