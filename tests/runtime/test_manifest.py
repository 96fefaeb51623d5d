"""What a manifest refuses, each with one sentence."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillgraph import load
from stillgraph.errors import StillgraphError
from stillgraph.files import check_files
from stillgraph.manifest import Manifest, json_schema, read


@pytest.fixture
def edited(bundle_of) -> Callable[..., Path]:
    """A bundle whose manifest went through a function."""

    def make(change: Callable[[dict], object]) -> Path:
        bundle = bundle_of()
        path = bundle / "manifest.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
        return bundle

    return make


def test_a_manifest_reads_as_it_was_written(bundle_of) -> None:
    bundle = bundle_of()
    manifest = read(bundle)
    check_files(bundle, manifest, hashes=True)
    assert manifest.to_json() == (bundle / "manifest.json").read_text()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(color="red"), "color: Extra inputs"),
        (lambda raw: raw["graphs"]["decode"].update(color="red"), "graphs.decode.color: Extra inputs"),
        (lambda raw: raw.update(format_version=4), "format version 4 and this stillgraph understands 5"),
        (lambda raw: raw.update(format_version=6), "format version 6 and this stillgraph understands 5"),
        (lambda raw: raw.update(quantization={"block_size": 0}), "quantization.block_size: Input should be"),
        (lambda raw: raw["graphs"]["decode"]["shape"].update(slack=8), "do not fit the model"),
        (lambda raw: raw.pop("format_version"), "format version None"),
        (lambda raw: raw.pop("weights"), "weights: Field required"),
        (lambda raw: raw["weights"]["file"].update(path="../weights.data"), "leaves the bundle"),
        (lambda raw: raw["graphs"]["decode"]["file"].update(path="/etc/passwd"), "leaves the bundle"),
        (lambda raw: raw["graphs"]["decode"]["inputs"][0].update(shape=[2, 1]), "do not fit the model"),
        (lambda raw: raw["model"]["layers"][0].update(window=3), "window 3"),
        (lambda raw: raw["graphs"]["decode"].update(aliases=[]), "aliases of graph decode"),
        (lambda raw: raw["graphs"]["decode"]["aliases"].pop(), "aliases of graph decode"),
        (
            lambda raw: raw["graphs"]["decode"]["aliases"][0].update(input="past_key_values.0.value"),
            "aliases of",
        ),
        (
            lambda raw: raw.update(requires={"onnxruntime": "new"}),
            "requires.onnxruntime: String should match",
        ),
        (lambda raw: raw["weights"]["file"].update(path="gone.data"), "gone.data is missing"),
        (lambda raw: raw["weights"]["file"].update(path="a" * 5000), "aaaa cannot be read"),
        (
            lambda raw: raw["weights"]["file"].update(page_sums="1" * 64),
            "damaged: it does not have the page sums",
        ),
        (lambda raw: raw["weights"]["file"].update(nbytes=5), "has 4 bytes where 5 are expected"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(edited, change, said) -> None:
    with pytest.raises(StillgraphError, match=said) as caught:
        load(edited(change))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_hashes_are_checked_on_request(edited) -> None:
    bundle = edited(lambda raw: raw["weights"]["file"].update(sha256="f" * 64))
    load(bundle)
    with pytest.raises(StillgraphError, match=r"weights\.data is damaged: it does not have the hash"):
        load(bundle, check_hashes=True)


def test_a_ctx_that_the_graph_does_not_have(bundle_of) -> None:
    bundle = bundle_of()
    path = bundle / "manifest.json"
    path.write_text(re.sub(r"\b64\b", "48", path.read_text()))
    with pytest.raises(StillgraphError, match=r"load graph: .* and the manifest says \(1, 1, 48, 1\)"):
        load(bundle)


def test_a_cache_that_memory_does_not_hold(bundle_of) -> None:
    bundle = bundle_of()
    path = bundle / "manifest.json"
    path.write_text(re.sub(r"\b64\b", str(1 << 60), path.read_text()))
    with pytest.raises(StillgraphError, match="load bundle: there is no memory for the cache"):
        load(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle_of, tmp_path: Path) -> None:
    bundle = bundle_of()
    outside = tmp_path / "weights.data"
    (bundle / "weights.data").rename(outside)
    (bundle / "weights.data").symlink_to(outside)
    with pytest.raises(StillgraphError, match="leaves the bundle"):
        load(bundle)


def in_the_hubs_cache(bundle: Path, cache: Path) -> Path:
    """As huggingface_hub lays a repository out: a snapshot of links to files named by their content."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "c0ffee", cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha1(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        up = "../" * len(link.relative_to(snapshot.parent).parts)
        link.symlink_to(f"{up}blobs/{blob.name}")
    return snapshot


def test_a_bundle_in_the_hubs_cache(bundle_of, tmp_path: Path) -> None:
    bundle = bundle_of()
    snapshot = in_the_hubs_cache(bundle, tmp_path / "hub")
    expected = [step.token for step in load(bundle).stream([3, 1, 4], max_new_tokens=5)]
    assert [step.token for step in load(snapshot).stream([3, 1, 4], max_new_tokens=5)] == expected
    outside = tmp_path / "hub" / "weights.data"
    shutil.copyfile(bundle / "weights.data", outside)
    (snapshot / "weights.data").unlink()
    (snapshot / "weights.data").symlink_to(outside)
    with pytest.raises(StillgraphError, match="leaves the bundle"):
        load(snapshot)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(StillgraphError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(StillgraphError, match=r"has no manifest\.json"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StillgraphError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(StillgraphError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(StillgraphError, match="format version None"):
        load(tmp_path)


@pytest.mark.parametrize("missing", ["prefill", "decode"])
def test_a_bundle_with_one_graph_names_the_export_that_adds_the_other(bundle_of, missing) -> None:
    roles = [role for role in ("prefill", "decode") if role != missing]
    said = f"has no {missing} graph; add one with 'stillgraph export {missing}'"
    with pytest.raises(StillgraphError, match=said):
        load(bundle_of(roles=roles))


def test_graphs_of_two_contexts_are_refused(bundle_of) -> None:
    with pytest.raises(StillgraphError, match="a prefill of ctx 64 and a decode of ctx 32"):
        load(bundle_of(decode_ctx=32))


def test_a_graph_that_is_no_graph(bundle_of) -> None:
    bundle = bundle_of()
    graph = bundle / "prefill.onnx"
    graph.write_bytes(b"x" * graph.stat().st_size)
    with pytest.raises(StillgraphError, match="load graph: ONNX Runtime cannot load"):
        load(bundle)


def test_the_json_schema_refuses_unknown_keys_too() -> None:
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert schema["properties"]["format_version"]["const"] == 5
