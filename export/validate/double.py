"""PyTorch's fp32 model evaluated in float64, without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode

PART = 1 << 24  # numbers of a matrix that are in float64 at a time: 128 MB


@contextmanager
def in_double(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every op of PyTorch that gets fp32 tensors computes in float64; the weights stay fp32.

    A rotary embedding's forward is left as it is: products of positions and frequencies in fp32 are a
    definition that PyTorch and the tables of our graphs share, not an error of either.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if "rotary" in type(module).__name__.lower():
                stack.enter_context(patch.object(module, "forward", _as_it_is(module.forward)))
        stack.enter_context(_Double())
        yield


class _Double(TorchFunctionMode):
    """Arguments and dtypes of fp32 become float64 on the way into an op."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__" or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            return func(*args, **kwargs)  # of a property; in place, which must not write into a copy
        if func is embedding:
            return _wide(func(*args, **kwargs))  # the rows that are read, not the table
        if func is linear:
            return _linear(*args, **kwargs)
        if func is Tensor.float:
            func = Tensor.double
        return func(*_wide(args), **{key: _wide(value) for key, value in kwargs.items()})


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` in float64, rows of a large matrix in parts."""
    rows = max(1, PART // weight.shape[1])
    parts = [linear(input.double(), part.double()) for part in torch.split(weight, rows)]
    product = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    return product if bias is None else product + bias.double()


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if value is torch.float32:
        return torch.float64
    if type(value) in (list, tuple):
        return type(value)(_wide(item) for item in value)
    return value


def _as_it_is(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward on fp32 arguments, out of the reach of the mode."""

    def narrow(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float64
        return value.float() if wide else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*map(narrow, args), **{key: narrow(value) for key, value in kwargs.items()})

    return call
