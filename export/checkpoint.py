"""A checkpoint on disk: its config, its tensors by name, and whether the two fit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.checkpoint_folder import (
    NO_CONFIG,
    STAGE,
    check_config,
    folder_of,
    gguf_of,
    read_json,
)
from stillgraph.exporter.families import Family, families
from stillgraph.exporter.smoothing import Smoothing, undo_in_table
from stillgraph.exporter.tensor_files import StoredTensor, find_tensors, parameter_names, stored_tensors
from stillgraph.spec import ModelSpec

if TYPE_CHECKING:  # its library is there where a GGUF is to be read
    from stillgraph.exporter.gguf_file.unpack import Unpacked

HEAD = "lm_head.weight"
Stamp = tuple[int, int, int]
CARRIED = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint folder that the export understands. Tensors are read one at a time.

    Of a GGUF the folder holds what a folder has besides its weights, and is there as long as `gguf` is.
    smoothings: what is done to its tensors while they are read; the model is the same with them.
    """

    id: str
    folder: Path
    family: Family
    config: Any
    tensors: dict[str, StoredTensor]  # by the name that the model has for it
    tied: str | None = None  # the tensor that is embedding and head in one
    gguf: Unpacked | None = None
    smoothings: tuple[Smoothing, ...] = ()
    _finite: set[str] = field(default_factory=set)  # tensors whose numbers have been looked at
    _stamps: dict[Path, Stamp] = field(default_factory=dict)

    @cached_property
    def spec(self) -> ModelSpec:
        return self.family.spec(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file, in the checkpoint's dtype; of a smoothed one a copy in fp32.

        Raises StillgraphError where a number of it is infinite or NaN.
        """
        return self._smoothed(name, self._stored(name))

    def rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows [R, C] of a matrix whose columns alone are smoothed; its other rows stay in the file."""
        return self._smoothed(name, self._stored(name)[rows])

    def _smoothed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for one in self.smoothings:
            tensor = one.applied(name, tensor)
        return tensor

    def _stored(self, name: str) -> torch.Tensor:
        tensor = self.tensors[name].read()
        if name not in self._finite:
            if count := _not_finite(tensor):
                problem = (
                    f"{self.id}: {count} of {tensor.numel()} numbers of tensor {name} are infinite or NaN"
                )
                raise StillgraphError(STAGE, problem, "export a checkpoint that was saved whole")
            self._finite.add(name)
        return tensor

    @property
    def head_name(self) -> str:
        """The matrix that scores the vocabulary: one of its own, or the embedding."""
        return HEAD if HEAD in self.tensors else self.tied or HEAD

    def head(self) -> torch.Tensor:
        """That matrix, as `tensor` has it."""
        return self.tensor(self.head_name)

    def smoothed(self, smoothings: tuple[Smoothing, ...]) -> Checkpoint:
        """The same checkpoint, whose tensors are smoothed when they are read."""
        return replace(self, smoothings=smoothings)

    def check_unchanged(self) -> None:
        """Raises StillgraphError where a file was written, replaced or removed since it was opened."""
        for path, stamp in self._stamps.items():
            if not path.is_file() or _stamps([path])[path] != stamp:
                problem = f"{path} changed while it was read"
                raise StillgraphError(STAGE, problem, "export again when nothing writes to it")

    def build(self, attention: str) -> torch.nn.Module:
        """The model with memory reserved and untouched in place of weights, so tracing costs no memory."""
        from transformers.initialization import no_init_weights

        config = type(self.config).from_dict(self.config.to_dict())
        config._attn_implementation = attention
        with no_init_weights(), default_dtype(torch.float32):
            model = self.family.build(config)
        model.tie_weights()  # skipped together with the initialization
        for one in self.smoothings:
            if self.tied in one.sources[1:]:
                undo_in_table(self.family.decoder(model).get_input_embeddings(), one)
        built: torch.nn.Module = model.eval().requires_grad_(False)
        return built

    def runnable(self) -> torch.nn.Module:
        """As `build`, with the faster of the attentions that its class has."""
        return self.build("sdpa" if self.family.build._supports_sdpa else "eager")

    def load(self) -> torch.nn.Module:
        """The reference: what transformers by itself makes of the folder, in fp32 with eager attention.

        Of a GGUF its weights are transformers' own reading, and the config, of which it loses parts, is ours.
        No code of the export takes part. Raises CheckFailed where transformers made up a tensor, and where
        one that the export reads is another than transformers has.
        """
        place: dict[str, Any] = {"pretrained_model_name_or_path": self.folder}
        if self.gguf:
            place = self.gguf.place() | {"config": self.config}
        with quiet_loading():
            model, told = self.family.build.from_pretrained(
                **place,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        made_up = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
        if made_up:
            problem = f"{self.id}: transformers finds no tensor {made_up[0]}"
            raise CheckFailed(STAGE, problem, "please report this bug")
        reference: torch.nn.Module = model.eval().requires_grad_(False)
        self._check_reading(reference)
        return reference

    def _check_reading(self, reference: torch.nn.Module) -> None:
        """Compare every tensor that the export reads with transformers', number by number."""
        expected = dict(reference.named_parameters(remove_duplicate=False))
        for name in self.tensors:
            found = self.tensor(name).to(torch.float32)
            if name not in expected or not torch.equal(found, expected[name]):
                problem = f"{self.id}: tensor {name} is read otherwise than by transformers"
                raise CheckFailed(STAGE, problem, "please report this bug")

    @cached_property
    def sha256(self) -> str:
        """Hash of config and weights: what makes two exports exports of one checkpoint."""
        total = hashlib.sha256()
        for path in [self.folder / "config.json", *sorted({tensor.path for tensor in self.tensors.values()})]:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def _stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    """What is another for a file that was written to or replaced: inode, bytes, time in ns."""
    found = {path: path.stat() for path in paths}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def _not_finite(tensor: torch.Tensor) -> int:
    """How many numbers are infinite or NaN. Without a copy where there are none."""
    if not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bar and report: what matters of it is an error here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bar = gguf_reader.tqdm  # which that switch does not turn off
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        gguf_reader.tqdm = bar
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def open_checkpoint(model: str) -> Checkpoint:
    """Find, read and check a checkpoint: of SHIPPED, a local folder, a GGUF or a hub id.

    Raises StillgraphError.
    """
    gguf = _unpacked(path) if (path := gguf_of(model)) else None
    folder = gguf.folder if gguf else folder_of(model)
    check_config(folder)
    before = _stamps([folder / "config.json"])
    raw = read_json(folder / "config.json", NO_CONFIG)
    architectures = raw.get("architectures") or [None]
    family = families().get(architectures[0])
    if family is None:
        problem = f"{model}: architecture {architectures[0]!r} is not supported"
        raise StillgraphError(STAGE, problem, f"use {', '.join(families())}")
    with _valid_config(model):
        config = family.config(raw)
        config._attn_implementation = "eager"  # whatever it asks for is no part of the model
    if (how := raw.get("quantization_config")) is not None:  # of a composite config too
        method = how.get("quant_method") if isinstance(how, dict) else how
        problem = f"{model}: a quantized checkpoint (quantization_config, {method}) is not supported"
        raise StillgraphError(STAGE, problem, "export the original checkpoint")
    with _valid_config(model):
        reason = family.refuse(config)
    if reason:
        raise StillgraphError(STAGE, f"{model}: {reason} is not supported", "export another checkpoint")
    built = _on_meta(model, family, config)
    stored = gguf.tensors if gguf else stored_tensors(folder)
    before |= _stamps({tensor.path for tensor in stored.values()})
    tensors = find_tensors(built, path or folder, stored)
    tied = next((name for other, name in parameter_names(built).items() if other == HEAD != name), None)
    if tied and HEAD in tensors and not torch.equal(tensors[HEAD].read(), tensors[tied].read()):
        # As transformers has it: a head of its own in the file is the head, whatever the config says.
        tied = None
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        built = _on_meta(model, family, config)
    parameters = dict(built.named_parameters())
    tensors = {name: tensor for name, tensor in tensors.items() if name in parameters}
    return Checkpoint(model, folder, family, config, tensors, tied, gguf, _stamps=before)


def _unpacked(path: Path) -> Unpacked:
    from stillgraph.exporter.gguf_file.unpack import unpack

    return unpack(path)


def _on_meta(model: str, family: Family, config: Any) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"), _valid_config(model):
        return family.build(config)


@contextlib.contextmanager
def _valid_config(model: str) -> Iterator[None]:
    """Turn any config exception into one StillgraphError."""
    try:
        yield
    except Exception as error:
        problem = f"{model}: config.json is not valid: {' '.join(str(error).split())}"
        raise StillgraphError(STAGE, problem, "fix config.json") from error
