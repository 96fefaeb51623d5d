"""A checkpoint on disk: its config, its tensors by name, and whether the two fit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from stillgraph.errors import StillgraphError
from stillgraph.exporter.checkpoint_folder import NO_CONFIG, STAGE, folder_of, read_json
from stillgraph.exporter.families import Family, families
from stillgraph.spec import ModelSpec

HEAD = "lm_head.weight"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
CARRIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint folder that the export understands. Tensors are read one at a time."""

    id: str
    folder: Path
    family: Family
    config: Any
    files: dict[str, Path]  # tensor name, as the model has it, to the safetensors file that holds it
    stored: dict[str, str] = field(
        default_factory=dict
    )  # that name to the one in the file, where they differ
    tied: str | None = None  # the tensor that is embedding and head in one

    @cached_property
    def spec(self) -> ModelSpec:
        return self.family.spec(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file, in the checkpoint's dtype."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.stored.get(name, name))
            return tensor

    def build(self, attention: str) -> torch.nn.Module:
        """The model with memory reserved and untouched in place of weights, so tracing costs no memory."""
        from transformers.initialization import no_init_weights

        config = type(self.config).from_dict(self.config.to_dict())
        config._attn_implementation = attention
        with no_init_weights(), default_dtype(torch.float32):
            model = self.family.build(config)
        model.tie_weights()  # skipped together with the initialization
        built: torch.nn.Module = model.eval().requires_grad_(False)
        return built

    def load(self) -> torch.nn.Module:
        """The reference: the original model in fp32 with eager attention."""
        model = self.build("eager")
        for name, parameter in model.named_parameters():
            parameter.copy_(self.tensor(name))
        return model

    @cached_property
    def sha256(self) -> str:
        """Hash of config and weights: what makes two exports exports of one checkpoint."""
        total = hashlib.sha256()
        for path in [self.folder / "config.json", *sorted(set(self.files.values()))]:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def open_checkpoint(model: str) -> Checkpoint:
    """Find, read and check a checkpoint: of SHIPPED, a local folder or a hub id. Raises StillgraphError."""
    folder = folder_of(model)
    raw = read_json(folder / "config.json", NO_CONFIG)
    architectures = raw.get("architectures") or [None]
    family = families().get(architectures[0])
    if family is None:
        known = ", ".join(families())
        raise StillgraphError(
            STAGE, f"{model}: architecture {architectures[0]!r} is not supported", f"use {known}"
        )
    with _valid_config(model):
        config = family.config(raw)
    if reason := family.refuse(config):
        raise StillgraphError(STAGE, f"{model}: {reason} is not supported", "export another checkpoint")
    with torch.device("meta"), _valid_config(model):
        built = family.build(config)
    found = dict(_tensor_files(folder))
    names = model_names(built, found)
    checkpoint = Checkpoint(
        model,
        folder,
        family,
        config,
        files={name: found[stored] for name, stored in names.items()},
        stored={name: stored for name, stored in names.items() if name != stored},
        tied=next((name for other, name in parameter_names(built).items() if other == HEAD != name), None),
    )
    _check_tensors(checkpoint, built)
    return checkpoint


def parameter_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of a parameter, and the one that the checkpoint has it by: tied ones have several."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of each tensor of a checkpoint to its name there.

    Checkpoints keep the names that they were published with; transformers knows what has become of them.
    """
    renamings = get_model_conversion_mapping(model)
    return {rename_source_key(name, renamings, [])[0]: name for name in stored}


@contextlib.contextmanager
def _valid_config(model: str) -> Iterator[None]:
    """Turn any config exception into one StillgraphError."""
    try:
        yield
    except Exception as error:
        problem = f"{model}: config.json is not valid: {' '.join(str(error).split())}"
        raise StillgraphError(STAGE, problem, "fix config.json") from error


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    paths = [folder / WEIGHTS]
    if not paths[0].is_file() and (folder / WEIGHTS_INDEX).is_file():
        index = read_json(folder / WEIGHTS_INDEX, "download the file again").get("weight_map")
        if not isinstance(index, dict):
            problem = f"{folder / WEIGHTS_INDEX} has no weight_map"
            raise StillgraphError(STAGE, problem, "download the file again")
        paths = [folder / name for name in sorted(set(index.values()))]
    for path in paths:
        if not path.is_file():
            raise StillgraphError(STAGE, f"{path} is missing", "download the checkpoint's safetensors files")
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            problem = f"{path} is damaged or cut short ({error})"
            raise StillgraphError(STAGE, problem, "download the file again") from error
        yield from ((name, path) for name in names)


def _check_tensors(checkpoint: Checkpoint, model: Any) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(expected)
    remedy = "export a checkpoint that fits its config.json"
    for what, names in (("lacks", set(expected) - set(checkpoint.files)),
                        ("has unknown", set(checkpoint.files) - set(expected) - tied)):  # fmt: skip
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise StillgraphError(
                STAGE, f"{checkpoint.id}: the checkpoint {what} tensor {min(names)}{more}", remedy
            )
    for name, shape in expected.items():
        with safe_open(checkpoint.files[name], framework="pt") as file:
            found = tuple(file.get_slice(checkpoint.stored.get(name, name)).get_shape())
        if found != shape:
            problem = (
                f"{checkpoint.id}: tensor {name} has shape {list(found)} where config.json says {list(shape)}"
            )
            raise StillgraphError(STAGE, problem, remedy)
