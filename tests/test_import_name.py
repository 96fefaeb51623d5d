"""`import stillgraph` and what it has, wherever Python is started and whatever lies there."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import stillgraph
from stillgraph.exporter.bench.contender import ContenderSource
from stillgraph.exporter.bench.variants import form
from stillgraph.manifest import read

FORMER = ("export", "patches", "runtime")  # names of our folders, and of anyone's
EXPORT_AND_LOAD = """
import sys
import stillgraph

checkpoint, out = sys.argv[1:]
said = []
place = stillgraph.export(checkpoint, out, max_len=8, ctx=16, validate=False, progress=said.append)
engine = stillgraph.load(place)
steps = list(engine.stream("a", max_new_tokens=3))
assert isinstance(engine, stillgraph.Engine) and isinstance(steps[0], stillgraph.Step)
print(place, said[0], *sorted(set(sys.modules) & {"export", "patches", "runtime"}), sep="; ")
"""


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with packages of our folders' names, and with an empty folder of our import name."""
    for name in FORMER:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('the wrong {name}')")
    (tmp_path / "stillgraph").mkdir()
    return tmp_path


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_export_and_load_among_folders_of_these_names(tiny_checkpoint, elsewhere) -> None:
    said = run(sys.executable, "-c", EXPORT_AND_LOAD, str(tiny_checkpoint()), "out", cwd=elsewhere)
    assert said == "out; reading the checkpoint"
    assert set(read(elsewhere / "out").graphs) == {"prefill-8", "decode-16"}


@pytest.mark.parametrize("flags", [[], ["-P"]])
def test_python_m_among_folders_of_these_names(elsewhere, flags) -> None:
    assert run(sys.executable, *flags, "-m", "stillgraph", "--version", cwd=elsewhere) == version(
        "stillgraph"
    )
    help_text = run(sys.executable, *flags, "-m", "stillgraph.exporter", "bundle", "--help", cwd=elsewhere)
    assert "--max-len" in help_text


def test_a_child_of_the_bench_among_folders_of_these_names(tiny_checkpoint, elsewhere) -> None:
    """Not even a stillgraph.py of someone else's is in its way."""
    (elsewhere / "stillgraph.py").write_text("raise SystemExit('the wrong stillgraph')")
    source = ContenderSource(str(tiny_checkpoint()), "", elsewhere, elsewhere / "models", ctx=16, max_len=8)
    contender = form("portable", source)
    assert contender is not None
    (making,) = contender.prepare
    run(*making.command, cwd=elsewhere)
    assert set(read(Path(contender.model)).graphs) == {"prefill-8", "decode-16"}


def test_what_it_has() -> None:
    names = {"Engine", "Pool", "Step", "StillgraphError", "__version__", "export", "load"}
    assert set(stillgraph.__all__) == names
    assert all(getattr(stillgraph, name) for name in names)
    assert names <= set(dir(stillgraph))
    assert stillgraph.__version__ == version("stillgraph")
    with pytest.raises(AttributeError, match="module 'stillgraph' has no attribute 'expert'"):
        stillgraph.expert  # noqa: B018


def test_it_is_imported_at_first_use() -> None:
    """And `export` stays the function, whatever of the export is imported."""
    code = """
import json, sys
import stillgraph
first = [name for name in sys.modules if name.startswith("stillgraph.")]
stillgraph.export
heavy = {"torch", "onnx", "transformers", "onnxruntime"} & set(sys.modules)
print(json.dumps([first, sorted(heavy), callable(stillgraph.export)]))
import stillgraph.exporter.cli
assert callable(stillgraph.export), stillgraph.export
"""
    assert json.loads(run(sys.executable, "-c", code, cwd=Path.cwd())) == [[], [], True]
