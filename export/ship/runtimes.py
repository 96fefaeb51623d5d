"""What `ship` asks of a runtime, and which runtimes there are."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from stillgraph.errors import StillgraphError
from stillgraph.exporter.config import Say
from stillgraph.exporter.targets import CacheWrite
from stillgraph.golden import Tolerance
from stillgraph.manifest import Manifest, Target

STAGE = "ship"
DRIVERS = Path(__file__).with_name("drivers")


class Runtime(ABC):
    """One runtime. What a shipped folder has of it: the bundle's own files, `fill`'s, and its README.md.

    name: what --for takes; title: as its makers write it; sources: files and folders of `drivers/` that are
    copied into the shipped folder; cache_write: how a decode is to write one token into its cache; targets:
    whose ops it has; tolerance: its own, where it computes in another precision than the bundle.
    """

    name: str
    title: str
    sources: tuple[str, ...] = ()
    cache_write: CacheWrite = "ScatterElements"
    targets: tuple[Target, ...] = ("portable",)
    tolerance: Tolerance | None = None

    def for_chip(self, chip: str) -> Runtime:
        """The runtime for a system on a chip. Raises StillgraphError for one that it does not know."""
        raise StillgraphError(STAGE, f"--soc does nothing with --for {self.name}", "leave it out")

    def refuses(self, manifest: Manifest) -> str | None:
        """Why a bundle cannot be shipped for it, such as `it has no decode graph`; None where it can."""
        if manifest.graph("prefill") is None or manifest.graph("decode") is None:
            return "it has no prefill or no decode graph"
        if manifest.target not in self.targets:
            return f"its target is {manifest.target}, whose ops are ONNX Runtime's alone"
        if manifest.calling.prompt is None or not manifest.calling.prompt.continues:
            return "its prefill does not continue a cache"
        return None

    def fill(self, folder: Path, manifest: Manifest, say: Say) -> Manifest:
        """Add to, or change, what is in the folder; the manifest that it is to have.

        The folder holds the bundle's files, as hard links into the bundle: a file is replaced, never written
        into. Raises StillgraphError.
        """
        return manifest

    def copy_driver(self, folder: Path) -> None:
        for path in self.driver_files():
            shutil.copyfile(path, folder / path.name)

    def driver_files(self) -> list[Path]:
        """The driver's files in this package."""
        places = [DRIVERS / source for source in self.sources]
        found = (sorted(place.rglob("*")) if place.is_dir() else [place] for place in places)
        return [path for paths in found for path in paths if path.is_file() and path.suffix != ".pyc"]

    @abstractmethod
    def command(self, folder: Path) -> Sequence[str] | str:
        """What runs the driver of a shipped folder in a process of its own, or why it cannot run here.

        With `--golden golden.json` behind it the process prints a line of JSON for each case: name, tokens,
        finish_reason, logits (as golden.json lists them), load_ms, ttft_ms, tpot_ms, peak_rss_mb, versions.
        """


def runtimes() -> dict[str, Runtime]:
    """All runtimes by name."""
    package = importlib.import_module(__package__ or "")
    modules = (f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    found = (getattr(importlib.import_module(name), "RUNTIME", None) for name in modules)
    return {runtime.name: runtime for runtime in found if runtime is not None}
