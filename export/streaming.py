"""A model that runs without being in memory: a layer's weights come with its turn, and leave again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stillgraph.exporter.checkpoint import Checkpoint
from stillgraph.exporter.memory import available_memory

NOTHING = torch.empty(0)
RESIDENT = 3 << 30  # bytes: layers that are no larger in fp32 may stay in memory once they are there


def stay(numbers: int) -> bool:
    """Whether layers of that many numbers stay in memory in fp32 for a model that runs many times: it is over
    twice as fast then, and takes no more than half of what is free."""
    free = available_memory()
    return 4 * numbers <= (RESIDENT if free is None else min(RESIDENT, free / 2))


def empty(module: nn.Module) -> None:
    """Take the weights of a module out of memory."""
    for parameter in module.parameters():
        parameter.data = NOTHING


@contextmanager
def streamed(checkpoint: Checkpoint, model: Any, again: bool = False) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a model of `Checkpoint.build` its weights in fp32: a layer's while it runs, the others now.

    Yields what turns token ids [B, S] into ids of the same rows in a table of only these rows, which is what
    the embedding has from then on. again: the model runs many times, and layers `stay`.
    With gradients enabled a layer stays, for its way back: `empty` it then.
    """
    decoder = checkpoint.family.decoder(model)
    embedding = decoder.get_input_embeddings()
    embedding.padding_idx, table = None, embedding.weight
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = [parameter for layer in decoder.layers for parameter in layer.parameters()]
    resident = again and stay(sum(parameter.numel() for parameter in inside))

    def weight(parameter: nn.Parameter) -> Tensor:
        return checkpoint.tensor(names[id(parameter)]).to(torch.float32)

    def load(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            if not parameter.numel():
                parameter.data = weight(parameter)

    def drop(module: nn.Module, *_: Any) -> None:
        if not (resident or torch.is_grad_enabled()):
            empty(module)

    def embedded(ids: Tensor) -> Tensor:
        rows, places = cast("tuple[Tensor, Tensor]", torch.unique(ids, return_inverse=True))
        table.data = checkpoint.rows(names[id(table)], rows).to(torch.float32)
        return places

    streams = {id(parameter) for parameter in (*inside, table)}
    for parameter in decoder.parameters():
        parameter.data = NOTHING if id(parameter) in streams else weight(parameter)
    hooks = []
    for layer in decoder.layers:
        hooks += [layer.register_forward_pre_hook(load), layer.register_forward_hook(drop)]
    try:
        yield embedded
    finally:
        for hook in hooks:
            hook.remove()
