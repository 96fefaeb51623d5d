"""`stillgraph.export`: it does what `stillgraph export bundle` does, and raises what that would show."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

import stillgraph
from stillgraph import cli
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.cli import bundle
from stillgraph.exporter.validate.gates import Gate
from stillgraph.manifest import read

SIZES = {"max_len": 8, "ctx": 16}


def test_a_bundle_is_made_and_validated(tiny_checkpoint, tmp_path) -> None:
    said: list[str] = []
    place = stillgraph.export(tiny_checkpoint(), tmp_path / "out", **SIZES, progress=said.append)
    assert place == tmp_path / "out"
    validation = read(place).validation
    assert validation is not None
    assert validation.passed
    steps = ["reading the checkpoint", "tracing prefill-8", "writing weights"]
    assert [line for line in said if line in steps] == steps


def test_it_has_the_options_of_the_command() -> None:
    """With the same defaults, less what is about a terminal."""

    def options(function: Any) -> dict[str, Any]:
        return {name: option.default for name, option in inspect.signature(function).parameters.items()}

    command = options(bundle) | {"keep": (), "text": ()}
    asked = options(stillgraph.export)
    assert asked.pop("validate") == command.pop("validated")
    assert asked.pop("progress") is None
    assert (command.pop("quiet"), command.pop("as_json")) == (False, False)
    assert asked == command


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"max_len": 0}, ["--max-len", "0"]),
        ({"max_len": 17, "ctx": 16}, ["--max-len", "17", "--ctx", "16"]),
        ({"precision": "int3"}, ["--precision", "int3"]),
        ({"keep": "lm_head=int8"}, ["--keep", "lm_head=int8"]),
        ({"model": "nowhere/at all"}, ["-m", "nowhere/at all"]),
    ],
)
def test_it_raises_what_the_command_shows(tmp_path, capsys, options: Any, arguments) -> None:
    with pytest.raises(StillgraphError) as caught:
        stillgraph.export(out=tmp_path / "out", **options)
    assert cli.main(["export", "bundle", "--out", str(tmp_path / "out"), "--quiet", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "stillgraph.exporter.bundle.build", raising=False)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(StillgraphError) as caught:
        stillgraph.export(out=tmp_path / "out")
    assert (
        str(caught.value) == "stillgraph export: onnx_ir is not installed; pip install 'stillgraph[export]'."
    )
    assert cli.main(["export", "bundle", "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_a_broken_bound_is_raised_and_the_bundle_stays(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    none = Gate(kind="worst", value=0.0)
    monkeypatch.setattr("stillgraph.exporter.validate.validate.gate", lambda *_: none)
    with pytest.raises(CheckFailed, match=r"^validate: a relative error of .*parity\.html") as caught:
        stillgraph.export(tiny_checkpoint(), tmp_path / "out", **SIZES)
    assert caught.value.exit_code == 1
    assert (tmp_path / "out/reports/parity.html").is_file()


def test_without_validation_there_is_no_report(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = stillgraph.export(str(tiny_checkpoint()), **SIZES, validate=False)
    assert place == Path("artifacts/tiny")
    assert read(place).validation is None
