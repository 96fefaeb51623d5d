"""The tensors of a checkpoint: which file holds each, under which name, and whether they fit the model.

What a name stands for follows transformers: old names are renamed, a name may lack or have the base model's
prefix, the head of a tied pair may be stored alone, and what transformers ignores is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint_folder import STAGE, read_json

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
DOWNLOAD = "download the file again"
ADAPTER = "an adapter without its base model: merge it with PEFT's merge_and_unload"
PICKLE = "pickled weights, which may run code: convert them with transformers' save_pretrained"
# What a folder may hold in place of safetensors, and what to do, by the end of a file's name.
OTHER_FORMATS = {
    "adapter_model.safetensors": ADAPTER,
    "adapter_model.bin": ADAPTER,
    "adapter_config.json": ADAPTER,
    ".bin": PICKLE,
    ".pt": PICKLE,
    ".pth": PICKLE,
    ".gguf": "a GGUF: name the file itself",
}


class StoredTensor(Protocol):
    """Where a tensor lies: its file, and its name there."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    def read(self) -> torch.Tensor:
        """The tensor, mapped from its file or made of what is there, in the checkpoint's dtype."""

    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class SafeTensor:
    """A StoredTensor of a safetensors file."""

    path: Path
    name: str

    def read(self) -> torch.Tensor:
        """The tensor, mapped from its file, in the checkpoint's dtype."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
            return tensor

    def shape(self) -> tuple[int, ...]:
        with safe_open(self.path, framework="pt") as file:
            return tuple(file.get_slice(self.name).get_shape())


def find_tensors(model: Any, folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Every tensor of a model by its name there; model: as transformers builds it, on any device.

    stored: those of the checkpoint by the name that it gives them; folder: where it is, for messages.

    Of a tied pair each is listed that the checkpoint holds. Raises StillgraphError where one is missing, has
    another shape, or is neither the model's nor on transformers' own list of what may be left unread.
    """
    names = model_names(model, stored)
    places = parameter_names(model)
    found = {name: stored[names[name]] for name in sorted(places.keys() & names.keys())}
    for name, parameter in places.items():  # the head alone of a tied pair
        if name in found and parameter not in found:
            found[parameter] = found[name]
    unread = {name: names[name] for name in names.keys() - places.keys()}
    unknown = [unread[name] for name in _not_ignored(model, unread)]
    lacking = sorted(set(places.values()) - set(found))
    remedy = "export a checkpoint that fits its config.json"
    for what, missing in (("lacks", lacking), ("has unknown", sorted(unknown))):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            problem = f"{folder}: the checkpoint {what} tensor {missing[0]}{more}"
            raise StillgraphError(STAGE, problem, remedy)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in found and (shape := found[name].shape()) != tuple(parameter.shape):
            problem = f"{folder}: tensor {name} has shape {list(shape)}"
            problem += f" where config.json says {list(parameter.shape)}"
            raise StillgraphError(STAGE, problem, remedy)
    return found


def parameter_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of a parameter, and the one that the checkpoint has it by: tied ones have several."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each tensor of a checkpoint to its name there.

    Checkpoints keep the names that they were published with; transformers knows what has become of them.
    Raises StillgraphError where two have become one.
    """
    renamings, expected = get_model_conversion_mapping(model), model.state_dict()
    prefix, found = model.base_model_prefix, dict[str, str]()
    for name in stored:
        new = rename_source_key(name, renamings, [], prefix, expected)[0]
        if new not in expected and name in expected:  # it was to keep its name
            new = rename_source_key(name, [], [], prefix, expected)[0]
        if (other := found.setdefault(new, name)) != name:
            problem = f"the checkpoint has both {other} and {name} for tensor {new}"
            raise StillgraphError(STAGE, problem, "remove one of them")
    return found


def _not_ignored(model: Any, names: Iterable[str]) -> list[str]:
    """Those names that are not on transformers' list of what old checkpoints may hold besides."""
    told = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    model._adjust_missing_and_unexpected_keys(told)
    return sorted(told.unexpected_keys)


def _no_weights(folder: Path, path: Path) -> StillgraphError:
    """What a folder holds in place of the safetensors that are missing, where it is known."""
    for file in sorted(folder.iterdir()):
        for end, problem in OTHER_FORMATS.items():
            if file.name.endswith(end):
                what, _, remedy = problem.partition(": ")
                return StillgraphError(STAGE, f"{file} is {what}, and {path.name} is missing", remedy)
    remedy = "download the checkpoint's safetensors files"
    return StillgraphError(STAGE, f"{path} is missing", remedy)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's safetensors by their names there. Raises StillgraphError where none are."""
    return dict(_stored(folder))


def _stored(folder: Path) -> Iterator[tuple[str, SafeTensor]]:
    paths = [folder / WEIGHTS]
    if not paths[0].is_file() and (folder / WEIGHTS_INDEX).is_file():
        index = read_json(folder / WEIGHTS_INDEX, DOWNLOAD).get("weight_map")
        if not isinstance(index, dict):
            problem = f"{folder / WEIGHTS_INDEX} has no weight_map"
            raise StillgraphError(STAGE, problem, DOWNLOAD)
        wrong = [name for name in index.values() if not isinstance(name, str) or Path(name).name != name]
        if wrong:
            problem = f"{folder / WEIGHTS_INDEX} names {wrong[0]!r} as a file, which is none of its folder"
            raise StillgraphError(STAGE, problem, DOWNLOAD)
        paths = [folder / name for name in sorted(set(index.values()))]
    for path in paths:
        if not path.is_file():
            raise _no_weights(folder, path)
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            problem = f"{path} is damaged or cut short ({error})"
            raise StillgraphError(STAGE, problem, DOWNLOAD) from error
        yield from ((name, SafeTensor(path, name)) for name in names)
