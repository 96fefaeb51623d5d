"""Where the time of tiny bundles goes: every op and layer is there, and only what was to be counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from stillgraph.exporter.bench import op_profile
from stillgraph.exporter.bench.op_profile import BETWEEN, hotspot_table, layer_of, profiles
from stillgraph.exporter.bench.report import Hotspot, Profile

IDS = [2, 7, 9, 11, 30]
PARTS = ["embedding", "layer 0", "layer 1", "head", "other", BETWEEN]
BUNDLES: dict[str, dict[str, Any]] = {
    "portable fp32": {},
    "portable int4": {"precision": "int4"},
    "onnxruntime fp32": {"target": "onnxruntime"},
    "onnxruntime int4": {"target": "onnxruntime", "precision": "int4", "fast_prefill": True},
}
FUSED = set(
    "RMSNormalization BranchwiseRMSNorm RotaryEmbedding GroupQueryAttention Gelu Split Add Sub Mul Cast"
    " Unsqueeze".split()
)
# What ONNX Runtime makes of them when it loads them; it has changed if these do not hold.
DECODE_OPS = {
    "onnxruntime int4": FUSED | {"MatMulNBits", "GatherBlockQuantized", "Slice"},
    "onnxruntime fp32": FUSED | {"MatMul", "Gather", "Reshape", "Transpose"},
}
PORTABLE_OPS = {
    "SimplifiedLayerNormalization", "ScatterElements", "Softmax", "FusedMatMul", "MatMul", "Gelu", "Where",
    "Cos", "Sin", "Add", "Mul", "Reshape", "Gather",
}  # fmt: skip
Bundle = Callable[..., Path]
Refused = Callable[..., AbstractContextManager[None]]


def ops(profile: Profile) -> dict[str, int]:
    return {spot.name: spot.calls for spot in profile.by_op if spot.name != BETWEEN}


@pytest.mark.parametrize("name", BUNDLES)
def test_every_part_and_op_has_its_time(tiny_bundle: Bundle, name: str) -> None:
    prefill, decode = profiles(tiny_bundle(**BUNDLES[name]), IDS, 4, 1)
    assert (prefill.graph, prefill.runs) == ("prefill", 3)
    assert (decode.graph, decode.runs) == ("decode", 3)
    for profile in (prefill, decode):
        assert [spot.name for spot in profile.by_layer] == PARTS
        for spots in (profile.by_op, profile.by_layer):
            assert sum(spot.ms for spot in spots) == pytest.approx(profile.total_ms)
        assert sum(spot.calls for spot in profile.by_op) == sum(spot.calls for spot in profile.by_layer)
        assert [spot.ms for spot in profile.by_op] == sorted((s.ms for s in profile.by_op), reverse=True)
        assert 0 < sum(spot.ms for spot in profile.by_op if spot.name != BETWEEN) < profile.total_ms
    if name in DECODE_OPS:
        assert set(ops(decode)) == DECODE_OPS[name]
        assert ops(decode)["GroupQueryAttention"] == 2
        assert ops(decode)["RMSNormalization"] == 2 * 4 + 1
    else:
        assert PORTABLE_OPS - set(ops(decode)) == set()
        assert ops(decode)["ScatterElements"] == 4
    products = "MatMulNBits" if name.endswith("int4") else "MatMul"
    layers = 2 * 4 if name.startswith("onnxruntime") else 2 * 7
    assert ops(decode)[products] - 2 * (name == "portable fp32") == layers + 1


def test_a_compiled_bundle_has_the_same_parts(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from stillgraph.exporter.compile.compile import compile_bundle

    bundle = Path(shutil.copytree(tiny_bundle(**BUNDLES["onnxruntime int4"]), tmp_path / "bundle"))
    plain = profiles(bundle, IDS, 3, 1)
    compile_bundle(bundle, say=lambda line: None)
    for before, after in zip(plain, profiles(bundle, IDS, 3, 1), strict=True):
        assert ops(after) == ops(before)
        calls = [[(spot.name, spot.calls) for spot in profile.by_layer] for profile in (before, after)]
        assert calls[0] == calls[1]


def test_a_prompt_in_chunks_and_rows(tiny_bundle: Bundle) -> None:
    """Twenty tokens with a max_len of sixteen are two runs each time."""
    prefill, decode = profiles(tiny_bundle(batch=3), list(range(2, 22)), 8, 1)
    assert (prefill.runs, decode.runs) == (6, 7)
    assert [spot.name for spot in decode.by_layer] == PARTS


def test_the_first_request_does_not_count(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = op_profile._executions, {}

    def slow_start(folder: Path, role: str) -> list[op_profile.Execution]:
        runs = read(folder, role)
        seen[role] = len(runs)
        first = 2 if role == "decode" else 1
        return [op_profile.Execution(1e9, run.kernels) for run in runs[:first]] + runs[first:]

    monkeypatch.setattr(op_profile, "_executions", slow_start)
    for profile in profiles(tiny_bundle(), IDS, 6, 1):
        assert profile.total_ms < 1e6
        assert profile.runs == seen[profile.graph] - (2 if profile.graph == "decode" else 1)


def test_no_trace_is_left_behind(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    bundle = tiny_bundle()
    before = sorted(bundle.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    profiles(bundle, IDS, 3, 1)
    with refused("profile", "new tokens"):
        profiles(bundle, IDS, 1, 1)
    assert list(tmp_path.iterdir()) == []
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize(
    ("stage", "word", "ids", "tokens", "threads"),
    [
        ("profile", "no decode step", IDS, 1, 1),
        ("profile", "do not fit a cache of 40", IDS, 37, 1),
        ("read prompt", "is empty", [], 4, 1),
        ("read prompt", "outside the vocabulary", [272], 4, 1),
        ("load bundle", "threads is 0", IDS, 4, 0),
    ],
)
def test_what_a_bundle_cannot_take(
    tiny_bundle: Bundle,
    refused: Refused,
    stage: str,
    word: str,
    ids: Sequence[int],
    tokens: int,
    threads: int,
) -> None:
    with refused(stage, word):
        profiles(tiny_bundle(), ids, tokens, threads)


@pytest.mark.parametrize(
    ("node", "part"),
    [
        ("layers.3.mlp.down_proj/node_linear_27", "layer 3"),
        ("layers.12/node_add_4", "layer 12"),
        ("layers.0.input_layernorm/node_mul_7/SimplifiedLayerNormFusion/", "layer 0"),
        ("embed_tokens/node_mul", "embedding"),
        ("norm/node_mul_31", "head"),
        ("lm_head/node_linear_14/MatMulNBits_0", "head"),
        ("rotary_emb/node_cos", "other"),
        ("node_le", "other"),
        ("norm_token_5", "other"),
        ("layers.3_of_something_else", "other"),
        ("", "other"),
    ],
)
def test_a_name_says_the_part(node: str, part: str) -> None:
    assert layer_of(node) == part


def test_a_table_shows_the_longest_and_sums_the_rest() -> None:
    spots = tuple(Hotspot(name=f"Op{index}", ms=20.0 - index, calls=2) for index in range(20))
    parts = (Hotspot(name="layer 0", ms=10.0, calls=40), Hotspot(name=BETWEEN, ms=200.0, calls=1))
    table = hotspot_table(Profile(graph="decode", runs=4, total_ms=210.0, by_op=spots, by_layer=parts))
    lines = table.splitlines()
    assert lines[0] == "decode: 210.00 ms a run, mean of 4"
    assert lines[2:5] == [
        "| op | ms | share | calls |",
        "|---|---:|---:|---:|",
        "| Op0 | 20.000 | 9.5% | 2 |",
    ]
    assert lines[18:20] == ["| Op14 | 6.000 | 2.9% | 2 |", "| 5 more | 15.000 | 7.1% | 10 |"]
    assert lines[-2:] == ["| layer 0 | 10.000 | 4.8% | 40 |", f"| {BETWEEN} | 200.000 | 95.2% | 1 |"]
