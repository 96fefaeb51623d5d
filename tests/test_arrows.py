"""Which package may import which, by reading every file and by importing in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The import name of each folder. That of the runtime is the head of the others, so it comes last.
PACKAGES = {"export": "stillgraph.exporter", "patches": "stillgraph.patches", "runtime": "stillgraph"}
# What of the runtime is open to the export.
OPEN = (
    "archive calling certificate compiled cpu errors exit_codes files golden manifest metrics page_cache "
    "ports row serve.packages spec weight_tensor"
)
OF_RUNTIME = {f"stillgraph.{name}" for name in OPEN.split()}
# What is open to the bench besides: it runs the engine.
ENGINE = {"stillgraph.loading", "stillgraph.session"}
# What is open to the bundle besides: the files that a runtime reads, it describes in the manifest.
DESCRIBED = {f"stillgraph.{name}" for name in ("chat_template", "tokenizer", "vision.preprocessor")}
# The rooms of export/ from the ground up, and files beside them. Each imports only from lines above its own.
ROOMS = (
    "__init__ calibration demo gguf_file memory ort precisions staging targets",
    "checkpoint_folder",
    "families few_bits tensor_files texts",
    "config",
    "console ir",
    "smoothing",
    "checkpoint",
    "streaming",
    "quantize trace weights",
    "compile",
    "bundle",
    "validate",
    "bench prove ship",
    "api",
    "commands",
    "cli",
    "__main__",
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "safetensors")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Every absolute module that a file imports, anywhere in it; a relative import is yielded as `.`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "."
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in modules if is_module(name)]
            yield from submodules or [str(node.module)]


def folder_of(module: str) -> str | None:
    """The folder of a module of ours; None of a library's, and of a folder's own name."""
    names = PACKAGES.items()
    return next((folder for folder, name in names if f"{module}.".startswith(f"{name}.")), None)


def is_module(name: str) -> bool:
    folder = folder_of(name)
    if folder is None or name == "stillgraph":
        return False
    path = ROOT.joinpath(folder, *name.removeprefix(PACKAGES[folder]).split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(path: Path) -> str:
    """The room of a file of the export: a folder, or the file's own name."""
    return path.relative_to(ROOT / "export").parts[0].removesuffix(".py")


def upwards(room: str, source: str) -> list[str]:
    """What a file in a room of the export imports that is in no room below."""
    head = PACKAGES["export"] + "."
    ours = [name.removeprefix(head) for name in imported(source) if name.startswith(head)]
    others = [(head + name, name.partition(".")[0]) for name in ours]
    return [name for name, other in others if other != room and FLOORS[other] >= FLOORS[room]]


def wrong(folder: str, source: str) -> list[str]:
    """The imports of a file in `folder` that the arrows do not allow."""
    package = folder.partition("/")[0]
    names = list(imported(source))
    # A relative import, the names that are for users, and those of folders, which are none to import.
    bad = [name for name in names if name in (".", "stillgraph") or name.partition(".")[0] in PACKAGES]
    heavy = [name for name in names if name.partition(".")[0] in HEAVY]
    ours = [name for name in names if name not in bad and folder_of(name) not in (None, package)]
    if folder == "export/bench":
        return bad + heavy + [name for name in ours if name not in OF_RUNTIME | ENGINE]
    if package == "export":
        besides = {"export/bench/contenders": ENGINE, "export/bundle": DESCRIBED}
        allowed = OF_RUNTIME | besides.get(folder, set())
        return bad + [name for name in ours if name not in allowed and folder_of(name) != "patches"]
    if package == "runtime":
        return bad + ours + heavy
    return bad + ours


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package) -> None:
    assert files(package)
    found = {
        str(path): wrong(path.parent.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in files(package)
    }
    # For types alone: test_import_name.py sees that it is imported when it is used.
    opened = {str(ROOT / "runtime/__init__.py"): ["stillgraph.exporter.api"]}
    expected = opened if package == "runtime" else {}
    assert {path: names for path, names in found.items() if names} == expected


def test_rooms_import_downwards() -> None:
    found = {str(path): upwards(room_of(path), path.read_text(encoding="utf-8")) for path in files("export")}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in files("export")} == set(FLOORS)


@pytest.mark.parametrize(
    ("room", "source", "names"),
    [
        (
            "trace",
            "from stillgraph.exporter.bundle.build import export",
            ["stillgraph.exporter.bundle.build"],
        ),
        ("trace", "from stillgraph.exporter import bundle", ["stillgraph.exporter.bundle"]),
        (
            "bundle",
            "def f():\n    from stillgraph.exporter.validate import cases",
            ["stillgraph.exporter.validate.cases"],
        ),
        ("bundle", "from stillgraph.exporter.bundle import inspection", []),
        ("bundle", "from stillgraph.exporter.trace.tracing import convert", []),
    ],
)
def test_an_import_that_is_not_downwards_is_seen(room, source, names) -> None:
    assert upwards(room, source) == names


@pytest.mark.parametrize(
    ("folder", "source", "names"),
    [
        ("runtime", "import stillgraph.exporter.config", ["stillgraph.exporter.config"]),
        ("runtime", "def f():\n    from torch import nn", ["torch"]),
        ("runtime", "import onnxruntime, numpy", []),
        ("runtime", "from . import spec", ["."]),
        ("runtime", "from stillgraph import exporter", ["stillgraph.exporter"]),
        ("runtime", "from stillgraph import patches", ["stillgraph.patches"]),
        ("runtime", "from stillgraph import load", ["stillgraph"]),
        *((package, f"from {name} import x", [name]) for package in PACKAGES for name in PACKAGES),
        *((package, f"import {name}.x", [f"{name}.x"]) for package in PACKAGES for name in PACKAGES),
        ("export", "from stillgraph import load", ["stillgraph"]),
        ("export", "from stillgraph import spec", []),
        ("export", "from stillgraph.engine import Engine", ["stillgraph.engine"]),
        ("export/bench", "from stillgraph.loading import load\nimport torch", ["torch"]),
        ("export/bench", "from stillgraph.engine import Engine", ["stillgraph.engine"]),
        ("export/bench/contenders", "from stillgraph.loading import load\nimport torch", []),
        ("export", "from stillgraph.manifest import read\nfrom stillgraph.patches.patch import applied", []),
        ("patches", "from stillgraph.spec import Frozen", ["stillgraph.spec"]),
        ("patches", "from stillgraph import spec", ["stillgraph.spec"]),
        ("patches", "from stillgraph.exporter import config", ["stillgraph.exporter.config"]),
        ("patches", "from stillgraph.patches.patch import Patch", []),
        ("patches", "import torch", []),
    ],
)
def test_an_arrow_the_wrong_way_is_seen(folder, source, names) -> None:
    assert wrong(folder, source) == names


def test_no_module_is_named_after_a_library() -> None:
    ours = {name for name, owners in packages_distributions().items() if owners == ["stillgraph"]}
    libraries = (set(packages_distributions()) | set(sys.stdlib_module_names)) - ours
    names = {path.stem for package in PACKAGES for path in files(package) if path.stem[:2] != "__"}
    assert names & libraries == set()


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "stillgraph",
        "stillgraph.cli",
        "stillgraph.certificate",
        "stillgraph.commands",
        "stillgraph.exporter.api",
        "stillgraph.exporter.cli",
        "stillgraph.exporter.commands",
        "stillgraph.exporter.__main__",
        "stillgraph.exporter.bench.command",
        "stillgraph.exporter.ship.command",
    ],
)
def test_an_import_brings_nothing_heavy(module) -> None:
    assert fresh(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_importing_the_patches_changes_nothing() -> None:
    """Every attribute of what the patches change is the same object before and after their import."""
    code = f"""
import importlib
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers import modeling_utils

def attributes():
    owners = [modeling_gemma3, modeling_utils, torch, torch.Tensor, torch.nn.functional, torch.nn.Linear]
    owners += [value for value in vars(modeling_gemma3).values() if isinstance(value, type)]
    return {{(id(owner), name): id(value) for owner in owners for name, value in list(vars(owner).items())}}

before = attributes()
for name in {[path.stem for path in files("patches") if path.stem != "__init__"]}:
    importlib.import_module("stillgraph.patches." + name)
print(before == attributes())
"""
    assert fresh(code) == "True"
