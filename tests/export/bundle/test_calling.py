"""What the manifest says of calling a bundle's graphs, of what they need and of what they read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from stillgraph import load
from stillgraph.calling import SamplingDefaults
from stillgraph.exporter.bench.contenders.stillgraph_bundle import read_mb
from stillgraph.exporter.bundle import calling
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import Manifest, read
from stillgraph.spec import GraphShape
from stillgraph.tokenizer import Text

Bundle = Callable[..., Path]
PROMPT: list[tuple[GraphShape, tuple[int, bool]]] = [
    (GraphShape(role="prefill", max_len=16, ctx=40), (16, True)),
    (GraphShape(role="prefill", max_len=16), (16, False)),
    (GraphShape(role="dynamic", max_len=40, ctx=40), (40, True)),
]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of a checkpoint's folder."""
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


@pytest.mark.parametrize(("shape", "expected"), PROMPT)
def test_how_a_prompt_is_cut(model: Path, shape: GraphShape, expected: tuple[int, bool]) -> None:
    found = calling.calling(open_checkpoint(str(model)), [shape])
    assert found.prompt is not None
    assert (found.prompt.chunk, found.prompt.continues, found.prompt.whole_images) == (*expected, False)
    assert found.images is None
    assert {"prompt", "positions", "cache", "next", "stop"} <= set(found.rules)


def test_who_adds_the_first_token(model: Path) -> None:
    assert calling.bos_added(Text(model, 2), model, 2) == (True, True)
    raw = json.loads((model / "tokenizer.json").read_text())
    raw["post_processor"] = None
    (model / "tokenizer.json").write_text(json.dumps(raw))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", ""))
    assert calling.bos_added(Text(model, 2), model, 2) == (False, False)
    template.write_text("{{ raise_exception('no chats') }}")
    assert calling.bos_added(Text(model, 2), model, 2) == (False, None)
    assert calling.bos_added(None, model, 2) == (False, None)


def test_sampling_is_that_of_generation_config(model: Path, refused: Any) -> None:
    path = model / "generation_config.json"
    assert calling.sampling(model) == SamplingDefaults()
    path.write_text(
        json.dumps({"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"})
    )
    assert calling.sampling(model) == SamplingDefaults(do_sample=True, top_k=64, top_p=0.95)
    path.write_text(json.dumps({"top_k": "many"}))
    with refused("read checkpoint", "generation_config.json", "top_k", "many"):
        calling.sampling(model)
    path.unlink()
    assert calling.sampling(model) == SamplingDefaults()


def test_images_are_numbers(tiny_checkpoint: Callable[..., Path], tmp_path: Path, refused: Any) -> None:
    seeing = Path(shutil.copytree(tiny_checkpoint(family="gemma3_vision"), tmp_path / "model"))
    shape = GraphShape(role="prefill", max_len=16, ctx=40, embeds=True)
    found = calling.calling(open_checkpoint(str(seeing)), [shape])
    assert found.images is not None
    assert (found.images.size, found.images.resample, found.images.crop) == ((24, 24), 2, None)
    assert (found.images.mean, found.images.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert found.images.scale == pytest.approx(1 / 255)
    assert found.prompt is not None
    assert found.prompt.whole_images
    assert "images" in found.rules
    (seeing / "preprocessor_config.json").write_text('{"image_processor_type": "Own"}')
    with refused("read image processor", "Own"):
        calling.calling(open_checkpoint(str(seeing)), [shape])
    (seeing / "preprocessor_config.json").unlink()
    assert calling.calling(open_checkpoint(str(seeing)), [shape]).images is None


@pytest.mark.parametrize(
    ("values", "opset", "custom", "least"),
    [
        ({}, 20, set(), "1.20"),
        ({"precision": "int4"}, 21, set(), "1.20"),
        ({"target": "onnxruntime"}, 23, {"BranchwiseRMSNorm", "GroupQueryAttention"}, "1.32"),
        (
            {"target": "onnxruntime", "precision": "int8"},
            23,
            {"BranchwiseRMSNorm", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits"},
            "1.32",
        ),
    ],
)
def test_what_a_graph_needs_is_what_its_file_has(
    tiny_bundle: Bundle, values: dict[str, Any], opset: int, custom: set[str], least: str
) -> None:
    bundle = tiny_bundle(**values)
    manifest = read(bundle)
    for entry in manifest.graphs.values():
        file = onnx.load(bundle / entry.file.path, load_external_data=False)
        assert entry.ops.opsets == {item.domain: item.version for item in file.opset_import}
        assert entry.ops.opsets[""] == opset
        assert {node.op_type for node in file.graph.node if node.domain} == custom
        assert {name for names in entry.ops.custom.values() for name in names} == custom
        assert set(entry.ops.custom) == ({"com.microsoft"} if custom else set())
        assert entry.ops.onnxruntime == least
    assert manifest.requires.onnxruntime == least


READING: dict[str, dict[str, Any]] = {
    "tied fp32": {},
    "untied fp32": {"tie_word_embeddings": False},
    "untied int8": {"tie_word_embeddings": False, "precision": "int8"},
    "tied int4": {"precision": "int4"},
    "onnxruntime, untied int4": {
        "tie_word_embeddings": False, "precision": "int4", "target": "onnxruntime", "fast_prefill": True,
    },
    "onnxruntime, tied int8": {"precision": "int8", "target": "onnxruntime", "fast_prefill": True},
}  # fmt: skip


def decode_read(bundle: Path, manifest: Manifest) -> int:
    """Bytes of the weights file that some node of the decode graph other than a gather reads."""
    entry = manifest.graph("decode")
    assert entry is not None
    graph = onnx.load(bundle / entry.file.path, load_external_data=False).graph
    readers = {name for node in graph.node if "Gather" not in node.op_type for name in node.input}
    read_bytes = dict[str, int]()
    for tensor in graph.initializer:
        place = {item.key: item.value for item in tensor.external_data}
        if tensor.name in readers and place:
            read_bytes[place["offset"]] = int(place["length"])
    return sum(read_bytes.values())


@pytest.mark.parametrize("name", READING)
def test_a_step_reads_what_the_decode_graph_reads(tiny_bundle: Bundle, name: str) -> None:
    bundle = tiny_bundle(**READING[name])
    manifest = read(bundle)
    found = read_mb(manifest)
    assert found is not None
    assert round(found * 1e6) == decode_read(bundle, manifest)
    entry = manifest.graph("decode")
    assert entry is not None
    assert bool(entry.tables) == ("untied" in name or manifest.precision == "int8" or "int4" in name)
    embedding = 272 * 48  # entries of the table, less than any layout stores of it twice
    whole = sum({t.offset: t.nbytes for t in manifest.weights.tensors.values()}.values())
    assert (whole - found * 1e6 > embedding / 2) == ("untied" in name or "onnxruntime" in name)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_an_untied_embedding_is_compared_as_it_is_stored(
    tiny_bundle: Bundle, tmp_path: Path, target: str
) -> None:
    made = tiny_bundle(tie_word_embeddings=False, precision="int8", target=target)
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    parity = validate(bundle, depth="default", say=lambda line: None)
    assert max(case.worst.relative_error for case in parity.cases if not case.optimized) < 1e-5


def test_every_weight_says_what_it_is_made_of(
    tiny_bundle: Bundle, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The sources of all tensors are the checkpoint's, and those of plain ones can be made from them."""
    from safetensors.numpy import load_file

    checkpoint = load_file(tiny_checkpoint() / "model.safetensors")
    for values in (
        {},
        {"precision": "int4"},
        {"target": "onnxruntime", "precision": "int8", "fast_prefill": True},
    ):
        bundle = tiny_bundle(**values)
        tensors = read(bundle).weights.tensors.values()
        assert {source for stored in tensors for source in stored.sources} == set(checkpoint)
        content = (bundle / "weights.data").read_bytes()
        for stored in (stored for stored in tensors if stored.layout == "plain"):
            assert (stored.block, stored.bits) == (None, 32)
            if not stored.sources:
                continue
            made = np.concatenate([checkpoint[source].astype(np.float32) for source in stored.sources])
            for change in stored.changes:
                assert change.op in ("Transpose", "Add")
                made = (
                    made.transpose(change.argument)
                    if change.op == "Transpose"
                    else made + np.float32(change.argument)
                )
            found = np.frombuffer(content, np.float32, made.size, stored.offset).reshape(stored.shape)
            np.testing.assert_array_equal(found, made)
        layouts = {stored.layout: stored for stored in tensors}
        if values:
            form = (4, 128) if values["precision"] == "int4" else (8, 32)
            codes = layouts.get("packed") or layouts["columns"]
            assert (codes.bits, codes.block) == form
        if "channels" in layouts:
            assert (layouts["channels"].bits, layouts["channels"].block) == (8, None)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_buffer_may_be_shared_and_need_not_be(tiny_bundle: Bundle, tmp_path: Path, target: str) -> None:
    """To the last slot, past several moves of the window, once with each permission taken back."""
    shared = tiny_bundle(target=target)
    bundle = Path(shutil.copytree(shared, tmp_path / "bundle"))
    whole = (bundle / "manifest.json").read_text()
    assert '"same_buffer": true' in whole
    (bundle / "manifest.json").write_text(whole.replace('"same_buffer": true', '"same_buffer": false'))
    ids = list(range(10, 31))
    tokens = []
    for folder in (shared, bundle):
        engine = load(folder)
        steps = engine.stream(ids, max_new_tokens=40, stop_tokens=())
        tokens.append([(step.token, step.logprob) for step in steps])
    assert len(tokens[0]) == 40 - 21 + 1
    assert tokens[0] == tokens[1]
