"""Sizes and settings that are refused before any work is done, and graphs that do not fit their bundle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import (
    ExportConfig,
    _asked,
    check_fits_bundle,
    check_heads,
    check_positions,
    decode_shape,
    prefill_shape,
    request,
    with_one_slack,
)
from stillgraph.manifest import Precision, Quantization, read
from stillgraph.spec import GraphShape

Refused = Callable[..., AbstractContextManager[None]]
VALUES: dict[str, Any] = {"model": "demo", "target": "portable", "precision": "fp32", "batch": 1, "out": None}


ORT: dict[str, Any] = {"target": "onnxruntime"}
INT4: dict[str, Any] = {"precision": "int4"}
KEPT = (
    "lm_head",
    "",
    "=int8",
    "lm_head=",
    "lm_head=int2",
    "lm_head=fp16",
    "lm_head:int8",
)  # not PATTERN=PRECISION


def test_a_request() -> None:
    config = request(**VALUES)
    assert config.place == Path("artifacts/demo")
    assert request(**VALUES | {"model": "/some/where/gemma"}).place == Path("artifacts/gemma")
    assert request(**VALUES | {"out": Path("here")}).place == Path("here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"precision": "int3"}, ("--precision 'int3'", "fp32 or fp16 or int8 or int4")),
        ({"target": "openvino"}, ("--target 'openvino'", "portable or onnxruntime")),
        (ORT | {"precision": "fp16"}, ("--precision fp16", "--target onnxruntime", "fp32, int8 or int4")),
        (INT4 | {"block_size": 0}, ("--block-size 0", "32 or 64 or 128")),
        (INT4 | {"block_size": 48}, ("--block-size 48", "32 or 64 or 128")),
        ({"precision": "int8", "block_size": 256}, ("--block-size 256", "32 or 64 or 128")),
        ({"block_size": 32}, ("--block-size", "--precision fp32", "int8 or int4")),
        ({"asymmetric": True}, ("--asymmetric", "--precision fp32", "int8 or int4")),
        ({"keep": ["lm_head=int8"]}, ("--keep", "--precision fp32", "int8 or int4")),
        ({"fast_prefill": True}, ("--fast-prefill", "--precision fp32", "int8 or int4")),
        ({"precision": "fp16", "block_size": 128}, ("--block-size", "--precision fp16", "int8 or int4")),
        (INT4 | {"fast_prefill": True}, ("--fast-prefill", "--target portable", "--target onnxruntime")),
        *(
            (INT4 | {"keep": ["*.o_proj=int8", wrong]}, (f"--keep {wrong!r}", "lm_head=int8"))
            for wrong in KEPT
        ),
        ({"budget": 5.0}, ("--budget", "--precision fp32", "int8 or int4")),
        ({"precision": "int8", "budget": 5.0}, ("--budget 5", "--precision int8", "leave one of them out")),
        (INT4 | {"budget": 5.0}, ("--budget 5", "--calibrate none", "leave one of them out")),
        (INT4 | {"calibrate": "samples", "budget": 3.0}, ("--budget 3", "between 4 and 9", "--budget 6.4")),
        (INT4 | {"calibrate": "samples", "budget": 10.0}, ("--budget 10", "between 4 and 9")),
        ({"kl": 0.1}, ("--kl", "--precision fp32", "int8 or int4")),
        ({"precision": "int8", "kl": 0.1}, ("--kl 0.1", "--precision int8", "leave one of them out")),
        (INT4 | {"kl": 0.1}, ("--kl 0.1", "--calibrate none", "leave one of them out")),
        (INT4 | {"calibrate": "samples", "kl": -0.1}, ("--kl -0.1 is no divergence", "--kl 0.05")),
        (INT4 | {"calibrate": "samples", "kl": float("nan")}, ("--kl nan is no divergence",)),
        (
            INT4 | {"calibrate": "samples", "kl": 0.1, "budget": 5.0},
            ("--budget 5 and --kl 0.1", "one of them"),
        ),
        ({"calibrate": "text"}, ("--calibrate does nothing", "--precision fp32", "--precision int8 or int4")),
        ({"batch": 0}, ("--batch 0", "1 or more")),
        ({"batch": -2}, ("--batch -2", "1 or more")),
    ],
)
def test_a_request_for_what_is_not_built(
    refused: Refused, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused("export", *words):
        request(**VALUES | values)


def test_a_request_for_quantized_weights() -> None:
    assert request(**VALUES).quantization is None
    assert request(**VALUES | {"precision": "int8"}).quantization == Quantization(block_size=32)
    tables: dict[str, Precision] = {"embed_tokens": "int8", "lm_head": "int8"}
    assert request(**VALUES | INT4).quantization == Quantization(block_size=64, symmetric=False, keep=tables)
    options = {"block_size": 32, "asymmetric": False, "keep": ["lm_head=int4", "layers.0.*=fp32"]}
    assert request(**VALUES | INT4 | options).quantization == Quantization(
        block_size=32, keep={"embed_tokens": "int8", "lm_head": "int4", "layers.0.*": "fp32"}
    )
    fast = request(**VALUES | ORT | {"precision": "int8", "block_size": 64, "fast_prefill": True})
    assert fast.quantization == Quantization(block_size=64, fast_prefill=True)


def test_the_onnxruntime_target_has_slack_for_a_padded_chunk() -> None:
    config = ExportConfig(target="onnxruntime")
    decode = decode_shape(config, 1024)
    for max_len in (1, 32, 128, 129, 512):
        prefill = prefill_shape(config, max_len, 1024)
        assert prefill.slack is not None
        assert prefill.slack >= max_len - 1
        both = with_one_slack([prefill, decode])
        assert {shape.slack for shape in both} == {max(prefill.slack, decode.slack or 0)}
        assert [shape.model_copy(update={"slack": None}) for shape in both] == [
            shape.model_copy(update={"slack": None}) for shape in (prefill, decode)
        ]
    portable = [prefill_shape(ExportConfig(), 16, None), decode_shape(ExportConfig(), 40)]
    assert with_one_slack(portable) == portable
    assert {shape.slack for shape in portable} == {None}


def test_a_prefill_of_the_onnxruntime_target_has_a_cache(refused: Refused) -> None:
    with refused("export", "--target onnxruntime", "--ctx"):
        prefill_shape(ExportConfig(target="onnxruntime"), 16, None)


@pytest.mark.parametrize("head_dim", [6, 12, 20, 36])
def test_heads_that_the_op_does_not_take(
    refused: Refused,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
) -> None:
    """Before any work; the portable target takes them, and both take multiples of 8."""
    monkeypatch.setattr("stillgraph.exporter.bundle.build.convert", lambda *_: pytest.fail("work was done"))
    model = tiny_checkpoint(head_dim=head_dim)
    config = ExportConfig(model=str(model), out=tmp_path / "new", target="onnxruntime")
    with refused("export", f"head size of {head_dim}", "GroupQueryAttention", "--target portable"):
        export(config, [decode_shape(config, 40)], replace=True, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    spec = open_checkpoint(str(model)).spec
    check_heads(spec, "portable")
    for good in (8, 24, 256):
        layers = tuple(layer.model_copy(update={"head_dim": good}) for layer in spec.layers)
        check_heads(spec.model_copy(update={"layers": layers}), "onnxruntime")


@pytest.mark.parametrize(
    ("max_len", "ctx", "words"),
    [
        (17, 16, ("--max-len 17 is over --ctx 16", "lower --max-len or raise --ctx")),
        (0, None, ("--max-len 0", "1 or more")),
        (-1, 16, ("--max-len -1", "1 or more")),
        (8, 0, ("--ctx 0", "1 or more")),
        (8, -8, ("--ctx -8", "1 or more")),
    ],
)
def test_prefill_sizes(refused: Refused, max_len: int, ctx: int | None, words: tuple[str, ...]) -> None:
    with refused("export", *words):
        prefill_shape(ExportConfig(), max_len, ctx)


@pytest.mark.parametrize("ctx", [1, 0, -4])
def test_decode_sizes(refused: Refused, ctx: int) -> None:
    with refused("export", f"--ctx {ctx}", "2 or more"):
        decode_shape(ExportConfig(), ctx)


def test_shapes_at_the_edge_are_fine() -> None:
    assert prefill_shape(ExportConfig(batch=3), 16, 16) == GraphShape(
        role="prefill", batch=3, max_len=16, ctx=16
    )
    assert decode_shape(ExportConfig(), 2) == GraphShape(role="decode", max_len=1, ctx=2)


@pytest.mark.parametrize(
    ("shape", "option"),
    [
        (GraphShape(role="prefill", max_len=65), "--max-len 65"),
        (GraphShape(role="prefill", max_len=8, ctx=65), "--ctx 65"),
        (GraphShape(role="decode", max_len=1, ctx=65), "--ctx 65"),
    ],
)
def test_more_positions_than_the_model_has(
    refused: Refused, tiny_checkpoint: Callable[..., Path], shape: GraphShape, option: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint()))
    with refused("export", option, "max_position_embeddings of 64", "lower"):
        check_positions(checkpoint.spec, shape)
    check_positions(checkpoint.spec, GraphShape(role="decode", max_len=1, ctx=64))


PREFILL = GraphShape(role="prefill", max_len=16, ctx=40)
OTHERS: list[tuple[dict[str, Any], GraphShape, str]] = [
    ({"sha256": "0" * 64}, PREFILL, "checkpoint"),
    ({"target": "onnxruntime"}, PREFILL, "target portable"),
    ({"precision": "fp16"}, PREFILL, "precision fp32"),
    ({}, PREFILL.model_copy(update={"batch": 2}), "batch 1"),
    ({}, PREFILL.model_copy(update={"ctx": 48}), "ctx 40"),
    ({}, GraphShape(role="decode", max_len=1, ctx=32), "ctx 40"),
    ({}, GraphShape(role="prefill", max_len=41), "at most ctx"),
    (INT4 | {"quantization": Quantization(block_size=32)}, PREFILL, "precision fp32"),
    ({"quantization": Quantization(block_size=32)}, PREFILL, "quantization None"),
]


@pytest.mark.parametrize(("values", "shape", "word"), OTHERS, ids=[f"{v}{s.name}" for v, s, _ in OTHERS])
def test_graphs_of_two_kinds_in_one_bundle(
    refused: Refused, tiny_bundle: Callable[..., Path], values: dict[str, Any], shape: GraphShape, word: str
) -> None:
    bundle = tiny_bundle()
    manifest = read(bundle)
    values = {"out": bundle, **values}
    sha256 = values.pop("sha256", manifest.source.checkpoint_sha256)
    with refused("export", str(bundle), word, "--out"):
        check_fits_bundle(ExportConfig(**values), sha256, shape, manifest)


def test_a_prefill_that_the_cache_has_no_room_for(refused: Refused, tiny_bundle: Callable[..., Path]) -> None:
    """The bundle's cache has room for a padded chunk of 16; the sentence speaks of --max-len, an option."""
    bundle = tiny_bundle(target="onnxruntime")
    manifest = read(bundle)
    config = ExportConfig(target="onnxruntime", out=bundle)
    with refused("export", "room for a --max-len of 16", "has 17"):
        check_fits_bundle(
            config,
            manifest.source.checkpoint_sha256,
            PREFILL.model_copy(update={"max_len": 17, "slack": 16}),
            manifest,
        )


@pytest.mark.parametrize("shape", [PREFILL, GraphShape(role="decode", max_len=1, ctx=40)])
def test_a_graph_that_fits(tiny_bundle: Callable[..., Path], shape: GraphShape) -> None:
    manifest = read(tiny_bundle())
    check_fits_bundle(ExportConfig(), manifest.source.checkpoint_sha256, shape, manifest)


def test_an_export_refuses_before_it_traces(
    refused: Refused,
    tiny_checkpoint: Callable[..., Path],
    tiny_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stillgraph.exporter.bundle.build.convert", lambda *_: pytest.fail("work was done"))
    bundle, model = tiny_bundle(), str(tiny_checkpoint())
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    new = ExportConfig(model=model, out=tmp_path / "new")
    with refused("export", "--ctx 65"):
        export(new, [GraphShape(role="decode", max_len=1, ctx=65)], replace=False, say=lambda line: None)
    for config, word in (
        (ExportConfig(model=model, out=bundle, precision="fp16"), "precision"),
        (ExportConfig(model=str(tiny_checkpoint(seed=1)), out=bundle), "checkpoint"),
    ):
        with refused("export", word):
            export(config, [PREFILL], replace=False, say=lambda line: None)
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_added_to_whatever_was_measured_for_it() -> None:
    """What the budget chose is in the manifest of a bundle, and not in a request for another graph."""
    asked = request(**VALUES | INT4 | {"calibrate": "samples"}).quantization
    assert asked is not None
    assert _asked(asked.model_copy(update={"better": {"layers.0": "int8"}})) == _asked(asked)
    assert _asked(None) is None
