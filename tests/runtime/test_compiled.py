"""Which compiled folder is used, and what is said of one that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from stillgraph import compiled, load
from stillgraph.compiled import COMPILED, DESCRIPTION, Compiled, CompiledGraph, find, seal, set_options
from stillgraph.files import describe, sha256
from stillgraph.manifest import read

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
        graphs.append(CompiledGraph(source=entry.file, file=describe(bundle, path), worst_difference=0.0))
    description = Compiled(
        cpu=CPU,
        onnxruntime=ort.__version__,
        packed=True,
        weights=manifest.weights.file,
        graphs=tuple(graphs),
        data=describe(bundle, folder / "packed.data"),
    )
    (folder / DESCRIPTION).write_text(description.to_json())
    seal(folder).write_text(sha256(folder / DESCRIPTION))
    return bundle


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    seal(path.parent).write_text(sha256(path))


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
    edit(folder / DESCRIPTION, format_version=4)


def unknown_key(bundle: Path, folder: Path) -> None:
    edit(folder / DESCRIPTION, surprise=1)


def no_json(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).write_bytes(b"\xff{")


def no_object(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).write_text("[]")


def nested(bundle: Path, folder: Path) -> None:
    (folder / DESCRIPTION).write_text("[" * 200_000)


def retold(bundle: Path, folder: Path) -> None:
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace('"packed": true', '"packed": false'))


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
        (newer, f"its {DESCRIPTION} cannot be read (format version 4 where this stillgraph understands 3)"),
        (unknown_key, f"its {DESCRIPTION} cannot be read (surprise: Extra inputs are not permitted)"),
        (no_json, f"its {DESCRIPTION} cannot be read ("),
        (no_object, f"its {DESCRIPTION} cannot be read (format version None"),
        (no_description, f"its {DESCRIPTION} cannot be read (No such file or directory)"),
        (missing, "packed.data is missing"),
        (nested, f"its {DESCRIPTION} cannot be read ("),
        (retold, f"{DESCRIPTION} is damaged: it does not have the hash in {CPU}.sha256"),
        (cut, "packed.data has 4 bytes where 6 are expected"),
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


def test_a_changed_byte_is_found(bundle: Path) -> None:
    (bundle / COMPILED / CPU / "packed.data").write_bytes(b"pAcked")
    reason = find(bundle, read(bundle)).reason
    assert reason is not None
    assert "packed.data is damaged: it does not have the page sums" in reason


def test_what_page_sums_cannot_see_is_found_on_request(bundle: Path) -> None:
    folder = bundle / COMPILED / CPU
    raw = json.loads((folder / DESCRIPTION).read_text())
    raw["data"]["sha256"] = "1" * 64
    edit(folder / DESCRIPTION, **raw)
    assert find(bundle, read(bundle)).compiled is not None
    reason = find(bundle, read(bundle), hashes=True).reason
    assert reason is not None
    assert "packed.data is damaged: it does not have the hash" in reason


def test_a_compiled_graph_that_does_not_load_is_left_for_the_bundles_own(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ONNX Runtime does not like about it, though its hash is right."""
    folder = bundle / COMPILED / CPU
    raw = json.loads((folder / DESCRIPTION).read_text())
    expected = [step.token for step in load(bundle, compiled=False).stream([3, 1, 4], max_new_tokens=4)]
    for graph in raw["graphs"]:
        path = bundle / graph["file"]["path"]
        path.write_bytes(b"no graph")
        graph["file"] = describe(bundle, path).model_dump()
    edit(folder / DESCRIPTION, graphs=raw["graphs"])
    engine = load(bundle)
    assert [step.token for step in engine.stream([3, 1, 4], max_new_tokens=4)] == expected
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "The bundle's own graph is used"
    ] * 2
