"""Bundles with a golden.json, once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillgraph.exporter.validate.validate import validate

Bundle = Callable[..., Path]


def proven_copy(bundle: Path, folder: Path) -> Path:
    own = Path(shutil.copytree(bundle, folder))
    validate(own, depth="quick", say=lambda line: None)
    return own


@pytest.fixture(scope="session")
def proven(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven_copy(tiny_bundle(), tmp_path_factory.mktemp("ship") / "tiny")


@pytest.fixture(scope="session")
def seeing(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven_copy(tiny_bundle(family="gemma3_vision"), tmp_path_factory.mktemp("ship") / "seeing")
