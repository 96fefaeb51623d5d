"""Rounded weights in a folder beside the bundle, so that an export that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillgraph.exporter.quantize.rounding import Format, Quantized
from stillgraph.exporter.smoothing import Smoothing

PARTS = ("codes", "scales", "zeros")


class Rounded:
    """Rounded weights by the checkpoint's names, each layer's in a file of its own.

    folder: of one checkpoint, text and set of options; `open` names it so.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._unsaved: dict[str, Quantized] = {}
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    names = {key.rpartition(":")[0] for key in file.keys()}  # noqa: SIM118 - not a dict
            except (SafetensorError, OSError):
                continue  # it was being written when the export was stopped
            self._files |= dict.fromkeys(names, path)

    def texts(self, make: Callable[[], Tensor]) -> Tensor:
        """The ids that weights are calibrated with: those of a calibration that was stopped, or what `make`
        returns."""
        path = self.folder / "texts"
        if not path.is_file():
            save_file({"ids": make().contiguous()}, staging := path.with_suffix(".part"))
            staging.replace(path)
        ids: Tensor = load_file(path)["ids"]
        return ids

    def smoothings(self, measure: Callable[[], tuple[Smoothing, ...]]) -> tuple[Smoothing, ...]:
        """Those of a calibration that was stopped, or what `measure` returns."""
        path = self.folder / "smoothings"
        if not path.is_file():
            found = {json.dumps([one.sources, one.offset]): one.exponents for one in measure()}
            save_file(found, staging := path.with_suffix(".part"))
            staging.replace(path)
        stored = load_file(path)
        # A dict has an order, a file of tensors none: by name, as a bundle has them.
        return tuple(
            Smoothing(tuple(sources), exponents, offset)
            for key, exponents in sorted(stored.items())
            for sources, offset in [json.loads(key)]
        )

    def get(self, name: str, form: Format) -> Quantized | None:
        """A weight as it was rounded; None where it was not, or in another form."""
        if name in self._unsaved:
            found = self._unsaved[name]
            return found if found.form == form else None
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            stored, said = set(file.keys()), file.metadata()
            parts = {part: file.get_tensor(key) for part in PARTS if (key := f"{name}:{part}") in stored}
        if said.get(name) != f"{form}":
            return None
        columns = int(said[f"{name}:columns"])
        return Quantized(form, columns, parts["codes"], parts["scales"], parts.get("zeros"))

    def add(self, name: str, quantized: Quantized) -> None:
        self._unsaved[name] = quantized

    def flush(self) -> None:
        """Write what was added since to a file that is there whole or not at all."""
        if not self._unsaved:
            return
        tensors, said = dict[str, Tensor](), dict[str, str]()
        for name, quantized in self._unsaved.items():
            found = {part: getattr(quantized, part) for part in PARTS}
            tensors |= {f"{name}:{part}": value for part, value in found.items() if value is not None}
            said |= {name: f"{quantized.form}", f"{name}:columns": f"{quantized.columns}"}
        path = self.folder / f"{len(self._files):06}.safetensors"
        staging = path.with_suffix(".part")
        save_file(tensors, staging, said)
        staging.replace(path)
        self._files |= dict.fromkeys(self._unsaved, path)
        self._unsaved = {}
