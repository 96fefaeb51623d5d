"""A declared change to a library, in force only while a graph is traced."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """What is replaced, by what, and why.

    target: `module:Class.attribute`; signature: the parameters the target must still have, so that a new
    release of the library is noticed; upstream: where the library's own code or issue is; remove_when: the
    event that makes the patch unnecessary.
    """

    name: str
    target: str
    signature: tuple[str, ...]
    replacement: Callable[..., Any]
    reason: str
    upstream: str
    remove_when: str

    def holder(self) -> tuple[Any, str]:
        """The object that holds the target, and the attribute's name on it."""
        module, _, path = self.target.partition(":")
        *parents, attribute = path.split(".")
        place: Any = importlib.import_module(module)
        for parent in parents:
            place = getattr(place, parent)
        return place, attribute


def forward_of(owner: type) -> str:
    """The target of a patch of a class's `forward`."""
    return f"{owner.__module__}:{owner.__qualname__}.forward"


@contextmanager
def applied(patches: tuple[Patch, ...]) -> Iterator[None]:
    """Put the patches in place for the length of a `with` block.

    Raises RuntimeError where a target no longer has the signature that its patch was written for.
    """
    with ExitStack() as undo:
        for patch in patches:
            place, attribute = patch.holder()
            original = getattr(place, attribute)
            found = tuple(inspect.signature(original).parameters)
            if found != patch.signature:
                raise RuntimeError(
                    f"patch {patch.name}: {patch.target} takes {found}, expected {patch.signature}"
                )
            undo.callback(setattr, place, attribute, vars(place).get(attribute, original))
            setattr(place, attribute, patch.replacement)
        yield
