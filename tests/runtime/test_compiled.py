"""Which compiled folder is used, and what is said of one that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from stillgraph import compiled
from stillgraph.compiled import COMPILED, DESCRIPTION, Compiled, CompiledGraph, find, set_options
from stillgraph.manifest import File, Manifest, read, sha256

CPU = "this-cpu"
Change = Callable[[Path, Path], None]  # given the bundle and its compiled folder


@pytest.fixture
def bundle(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with a compiled folder that fits: its own graphs under other names, and a file of weights."""
    monkeypatch.setattr(compiled, "cpu_name", lambda: CPU)
    bundle = bundle_of()
    manifest, folder = read(bundle), bundle / COMPILED / CPU
    folder.mkdir(parents=True)
    (folder / "packed.data").write_bytes(b"packed")
    graphs = []
    for entry in manifest.graphs.values():
        path = folder / f"compiled-{entry.file.path}"
        path.write_bytes((bundle / entry.file.path).read_bytes())
        graphs.append(CompiledGraph(source=entry.file, file=described(bundle, path), worst_difference=0.0))
    description = Compiled(
        cpu=CPU,
        onnxruntime=ort.__version__,
        packed=True,
        weights=manifest.weights.file,
        graphs=tuple(graphs),
        data=described(bundle, folder / "packed.data"),
    )
    (folder / DESCRIPTION).write_text(description.to_json())
    return bundle


def described(bundle: Path, path: Path) -> File:
    name = path.relative_to(bundle).as_posix()
    return File(path=name, nbytes=path.stat().st_size, sha256=sha256(path))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_that_fits_is_used(bundle: Path) -> None:
    manifest = read(bundle)
    for hashes in (False, True):
        found = find(bundle, manifest, hashes=hashes)
        assert found.compiled is not None
        assert found.reason is None
    for entry in manifest.graphs.values():
        graph = found.compiled.graph(entry)
        assert graph is not None
        options = ort.SessionOptions()
        set_options(options, bundle, found.compiled.packed)
        session = ort.InferenceSession(str(bundle / graph.file.path), options)
        assert [value.name for value in session.get_inputs()] == [port.name for port in entry.inputs]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("former", ["0", "1", None])
def test_options_are_those_of_the_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], packed: bool, former: str | None
) -> None:
    options = ort.SessionOptions()
    if former is not None:
        options.add_session_config_entry("session.disable_prepacking", former)
    set_options(options, tmp_path, packed)
    try:
        disabled = options.get_session_config_entry("session.disable_prepacking") == "1"
    except RuntimeError:
        disabled = False
    assert disabled is not packed
    warned = "will be overwritten" in capfd.readouterr().err
    assert warned is (former is not None and (former == "1") is packed)  # only where it had to change


def test_none_is_nothing_to_speak_of(bundle_of: Callable[..., Path]) -> None:
    bundle = bundle_of()
    assert find(bundle, read(bundle)) == compiled.Found(None, None)
    (bundle / COMPILED / "cpu-of-an-interrupted-compile").mkdir(parents=True)
    assert find(bundle, read(bundle)) == compiled.Found(None, None)


def older(bundle: Path, folder: Path) -> None:
    edit(folder / DESCRIPTION, onnxruntime="1.0.0")


def renamed(bundle: Path, folder: Path) -> None:
    edit(folder / DESCRIPTION, cpu="their-cpu")


def elsewhere(bundle: Path, folder: Path) -> None:
    folder.rename(folder.parent / "their-cpu")


def newer(bundle: Path, folder: Path) -> None:
    edit(folder / DESCRIPTION, format_version=3)


def unknown_key(bundle: Path, folder: Path) -> None:
    edit(folder / DESCRIPTION, surprise=1)


def no_json(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).write_bytes(b"\xff{")


def no_object(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).write_text("[]")


def no_description(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).unlink()


def missing(bundle: Path, folder: Path) -> None:
    (folder / "packed.data").unlink()


def cut(bundle: Path, folder: Path) -> None:
    (folder / "packed.data").write_bytes(b"pack")


def outside(bundle: Path, folder: Path) -> None:
    (folder / "packed.data").rename(bundle.parent / "packed.data")
    (folder / "packed.data").symlink_to(bundle.parent / "packed.data")


def of_other_weights(bundle: Path, folder: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["weights"]["file"]["sha256"] = "1" * 64
    (bundle / "manifest.json").write_text(json.dumps(raw))


def of_another_graph(bundle: Path, folder: Path) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["graphs"]["decode"]["file"]["sha256"] = "1" * 64
    (bundle / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (older, f"it was made by onnxruntime 1.0.0 and this is {ort.__version__}"),
        (renamed, f"it was made on their-cpu and this is {CPU}"),
        (elsewhere, f"{COMPILED}/their-cpu is not used: it is for another CPU, and this one is {CPU}"),
        (newer, f"its {DESCRIPTION} cannot be read (format version 3 where this stillgraph understands 2)"),
        (unknown_key, f"its {DESCRIPTION} cannot be read (surprise: Extra inputs are not permitted)"),
        (no_json, f"its {DESCRIPTION} cannot be read ("),
        (no_object, f"its {DESCRIPTION} cannot be read (format version None"),
        (no_description, f"its {DESCRIPTION} cannot be read (No such file or directory)"),
        (missing, "packed.data is missing"),
        (cut, f"packed.data has 4 bytes where {DESCRIPTION} says 6"),
        (outside, "packed.data leaves the bundle"),
        (of_other_weights, "the bundle's weights have changed since"),
        (of_another_graph, "the decode graph was added or changed since"),
    ],
)
def test_one_that_does_not_fit_is_not_used(bundle: Path, change: Change, words: str) -> None:
    change(bundle, bundle / COMPILED / CPU)
    found = find(bundle, read(bundle))
    assert found.compiled is None
    assert found.reason is not None
    assert words in found.reason
    assert "run 'stillgraph compile'" in found.reason
    assert "\n" not in found.reason
    assert found.reason.endswith(".")


def test_a_changed_byte_is_found_on_request(bundle: Path) -> None:
    (bundle / COMPILED / CPU / "packed.data").write_bytes(b"pAcked")
    manifest: Manifest = read(bundle)
    assert find(bundle, manifest).compiled is not None
    reason = find(bundle, manifest, hashes=True).reason
    assert reason is not None
    assert f"packed.data does not have the hash in {DESCRIPTION}" in reason
