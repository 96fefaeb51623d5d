"""Gemma 3 with its tower against transformers, where the tokens of a picture see each other.

The small one has 9 tokens a picture, a window of 5 and a prefill of 16 tokens; its onnxruntime target moves
the windows on every 16 tokens. Shapes: T features of a picture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stillgraph import Step, load
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.trace import image_cache
from stillgraph.exporter.trace.graphs import masks
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read

CTX = 112
PAIR = [("prefill", 16, CTX), ("decode", 1, CTX)]
SIGLIP: dict[str, Any] = {"family": "gemma3_vision"}
TOKENS = 64
TARGETS = ("portable", "onnxruntime")
MARK = "<start_of_image>"
Bundle = Callable[..., Path]


def quiet(line: str) -> None: ...


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_proven(tiny_bundle: Bundle, tmp_path: Path, target: str, batch: int) -> None:
    bundle = tiny_bundle(PAIR, target=target, batch=batch, **SIGLIP)
    parity = validate(Path(shutil.copytree(bundle, tmp_path / "own")), depth="quick", say=quiet)
    assert parity.passed, parity.problem()
    assert parity.max_feature_error is not None
    seen = [case for case in parity.cases if case.text == "picture"]
    assert min(case.prompt for case in seen) == 4 + 9 + 1 + 5 * (batch - 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        (MARK, 1),
        (f"five{MARK}bc", 1),  # the picture's 9 tokens would be cut by the edge of the first chunk
        (f"thirty bytes of text and more{MARK}d", 1),  # and come when the windows have moved on
        (f"{MARK}{MARK}", 2),
        (f"ab{MARK}c{MARK}de", 2),
    ],
)
def test_text_from_pictures(
    tiny_bundle: Bundle, drawn: Any, follows: Any, target: str, prompt: str, count: int
) -> None:
    bundle = tiny_bundle(PAIR, target=target, **SIGLIP)
    engine = load(bundle, threads=1)
    images = [drawn(seed) for seed in range(count)]
    ids = engine.ids(prompt)
    assert len(ids) == 1 + len(prompt.replace(MARK, "")) + count * (3 + 9 + 3)
    steps = list(engine.stream(prompt, images=images, max_new_tokens=TOKENS, stop_tokens=()))
    assert follows(steps, read(bundle).source.id, ids, images, min(TOKENS, CTX - len(ids) + 1))
    longer = f"{prompt}, and?"  # from the prefix
    again = list(engine.stream(longer, images=images, max_new_tokens=12, stop_tokens=()))
    assert follows(again, read(bundle).source.id, engine.ids(f"{prompt}, and?"), images, 12)


def test_two_rows_with_pictures_in_other_places(tiny_bundle: Bundle, drawn: Any, follows: Any) -> None:
    bundle = tiny_bundle(PAIR, target="onnxruntime", batch=2, **SIGLIP)
    engine = load(bundle, threads=1)
    prompts, images = [f"seven b{MARK}", f"{MARK} and {MARK}"], [[drawn(1)], [drawn(2), drawn(3)]]
    found: list[list[Step]] = [[], []]
    for row, step in engine.stream_batch(prompts, images=images, max_new_tokens=6, stop_tokens=()):
        found[row].append(step)
    checkpoint = read(bundle).source.id
    for prompt, given, steps in zip(prompts, images, found, strict=True):
        assert follows(steps, checkpoint, engine.ids(prompt), given, 6)


@pytest.mark.fresh_traces
@pytest.mark.parametrize("target", TARGETS)
def test_the_proof_fails_where_pictures_look_back_alone(
    tiny_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    from stillgraph.exporter.bundle.build import export
    from stillgraph.exporter.config import decode_shape, prefill_shape, request

    def blind(pictures: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, pictures.shape[1], source.shape[1], dtype=torch.bool)

    monkeypatch.setattr(image_cache, "same_picture", blind)
    monkeypatch.setitem(masks.__globals__, "same_picture", blind)
    config = request(
        model=str(tiny_checkpoint(**SIGLIP)), target=target, precision="fp32", batch=1, out=tmp_path / "own"
    )
    shapes = [prefill_shape(config, 16, CTX), decode_shape(config, CTX)]
    export(config, shapes, replace=False, say=quiet, vision=None)
    parity = validate(tmp_path / "own", depth="quick", say=quiet)
    assert {case.text for case in parity.cases if not parity.within_bound(case)} == {"picture"}


def test_a_picture_has_to_fit_into_one_call(tiny_bundle: Bundle, refused: Any) -> None:
    with refused("export", "--max-len 8", "picture of 9 tokens", "raise it to 9"):
        tiny_bundle([("prefill", 8, CTX), ("decode", 1, CTX)], **SIGLIP)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_few_bits(tiny_bundle: Bundle, tmp_path: Path, target: str) -> None:
    bundle = tiny_bundle(PAIR, target=target, precision="int4", **SIGLIP)
    names = set(read(bundle).weights.tensors)
    assert any("multi_modal_projector" in name and ".int8." in name for name in names)
    assert not any("vision_tower" in name and ".int4." in name for name in names)
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    parity = validate(own, depth="quick", say=quiet)
    assert all(parity.within_bound(case) for case in parity.cases), parity.problem()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vision_config": {"model_type": "clip_vision_model"}}, "vision tower of type 'clip_vision_model'"),
        ({"mm_tokens_per_image": 8}, "mm_tokens_per_image 8 of 6 x 6 patches"),
        ({"mm_tokens_per_image": 16}, "mm_tokens_per_image 16 of 6 x 6 patches"),
        ({"text_config": {"model_type": "gemma2"}}, "language model of type 'gemma2'"),
    ],
)
def test_what_is_not_supported_is_named(
    tiny_checkpoint: Any, tmp_path: Path, refused: Any, values: dict[str, Any], words: str
) -> None:
    own = shutil.copytree(tiny_checkpoint(**SIGLIP), tmp_path / "own")
    raw = json.loads((own / "config.json").read_text()) | values
    (own / "config.json").write_text(json.dumps(raw))
    with refused("read checkpoint", words, "not supported"):
        open_checkpoint(str(own))
