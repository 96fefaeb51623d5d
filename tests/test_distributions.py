"""What a wheel and an sdist hold: all of the code under its import names, and nothing beside it.

They are built here, in a checkout that may hold the links of an editable install. Hatchling follows links,
and a folder that it has seen twice it leaves out without a word.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import stillgraph

ROOT = Path(__file__).parent.parent
NAMES = {"runtime": "stillgraph", "export": "stillgraph/exporter", "patches": "stillgraph/patches"}
FOLDERS = {*NAMES, "tests", ".ci"}
RELEASE = f"stillgraph-{stillgraph.__version__}"


def code() -> set[str]:
    """Every file of the three packages, by its path in this repository; no cache of a tool."""
    found = (path.relative_to(ROOT) for name in NAMES for path in (ROOT / name).rglob("*") if path.is_file())
    return {
        path.as_posix() for path in found if not any(re.match(r"\.|__pycache__", part) for part in path.parts)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> dict[str, bytes]:
    """The files of a wheel built from this checkout: what is in its metadata, and the names of others."""
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) if ".dist-info/" in name else b"" for name in archive.namelist()}


def test_a_wheel_holds_all_of_the_code_and_nothing_else(wheel) -> None:
    expected = {
        NAMES[name.partition("/")[0]] + "/" + name.partition("/")[2]
        for name in code()
        if not name.endswith("/ruff.toml")
    }
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    assert {name.partition("/")[0] for name in wheel} == {"stillgraph", f"{RELEASE}.dist-info"}
    assert {"stillgraph/py.typed", "stillgraph/exporter/demo/demo_checkpoint/model.safetensors"} <= expected


def test_a_wheel_says_what_it_is(wheel) -> None:
    metadata = message_from_bytes(wheel[f"{RELEASE}.dist-info/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("stillgraph", stillgraph.__version__)
    entries = wheel[f"{RELEASE}.dist-info/entry_points.txt"].decode()
    assert "stillgraph = stillgraph.cli:main" in entries


def test_an_sdist_holds_all_of_the_code_and_what_it_is_built_with(tmp_path) -> None:
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        names = {Path(name) for name in archive.getnames()}
    assert {name.parts[0] for name in names} == {RELEASE}
    files = {name.relative_to(RELEASE).as_posix() for name in names}
    assert {name for name in files if name.partition("/")[0] in NAMES} == code()
    assert {name.partition("/")[0] for name in files if "/" in name} == FOLDERS
    assert {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "PKG-INFO"} <= files
