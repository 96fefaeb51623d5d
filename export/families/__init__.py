"""Model families: one file each, found by the architecture that a checkpoint names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patches.patch import Patch
from runtime.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """What the export must know of an architecture of transformers.

    architecture: its class name; model_type: the `model_type` of its config; config(raw): the config object
    of a raw config.json; refuse(config): why such a checkpoint cannot be exported, or None; spec(config): the
    model's shape; build(config): the model, weights not initialised; patches(config, target, precision): what
    is changed while it is traced.
    """

    architecture: str
    model_type: str
    config: Callable[[dict[str, Any]], Any]
    refuse: Callable[[Any], str | None]
    spec: Callable[[Any], ModelSpec]
    build: Callable[[Any], Any]
    patches: Callable[[Any, str, str], tuple[Patch, ...]]


def families() -> dict[str, Family]:
    """Every family of this folder, by architecture. A new one is a new file with a FAMILY in it."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.architecture: family for family in found}
