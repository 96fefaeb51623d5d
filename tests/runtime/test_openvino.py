"""A bundle in OpenVINO makes what it makes in ONNX Runtime, and what does not run there is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stillgraph import load

needed = pytest.mark.skipif("not __import__('importlib').util.find_spec('openvino')", reason="needs openvino")
PROMPT = [2, *range(5, 34)]  # over two chunks of 16, and over the window


def texts(bundle: Path, **options: Any) -> list[Any]:
    """A text that ends with the cache, the logits of one, and the first again after another."""
    images = options.pop("images", ())
    with load(bundle, **options) as engine:
        made = [step.token for step in engine.stream(PROMPT, max_new_tokens=30, stop_tokens=())]
        logits = np.array(list(engine.logits(PROMPT)))
        again = [step.token for step in engine.stream(PROMPT[:9], max_new_tokens=5, stop_tokens=())]
        seen = []
        if images:
            ids = engine.ids([engine.prompts.user("what", len(images))])
            seen = [
                step.token for step in engine.stream(ids, images=images, max_new_tokens=4, stop_tokens=())
            ]
    return [made, again, seen, logits]


@needed
@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "one at a time", "llama"])
def test_it_makes_the_same(tiny_bundle: Callable[..., Path], form: str) -> None:
    precision = form if form in ("fp16", "int8") else "fp32"
    # OpenVINO takes whole blocks alone.
    values = {"llama": {"family": "llama"}, "int8": {"hidden_size": 64, "intermediate_size": 96}}.get(
        form, {}
    )
    bundle, unload = tiny_bundle(precision=precision, **values), form == "one at a time"
    *expected, logits = texts(bundle, unload_prefill=unload)
    *found, theirs = texts(bundle, unload_prefill=unload, backend="openvino")
    assert len(expected[0]) > 8
    assert found == expected
    worst = np.abs(theirs - logits).max() / np.abs(logits).max()
    # Products of int8 round their inputs in ONNX Runtime.
    assert worst < {"fp16": 1e-2, "int8": 4e-2}.get(precision, 1e-5)


@needed
def test_it_sees_the_same(tiny_bundle: Callable[..., Path]) -> None:
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    bundle = tiny_bundle(family="gemma3_vision")
    *expected, logits = texts(bundle, images=[picture])
    *found, theirs = texts(bundle, images=[picture], backend="openvino")
    assert len(expected[2]) == 4
    assert found == expected
    assert np.abs(theirs - logits).max() < 1e-5 * np.abs(logits).max()


def test_what_does_not_run_there_is_told(
    tiny_bundle: Callable[..., Path], refused: Any, tmp_path: Path
) -> None:
    growing = tiny_bundle([("dynamic", 40, 40)])
    with refused("load bundle", "has a growing cache, and backend is openvino", "static graphs"):
        load(growing, backend="openvino")
    with refused("load bundle", "of ONNX Runtime's CPU provider, and backend is openvino", "portable"):
        load(tiny_bundle(target="onnxruntime"), backend="openvino")
    with refused("load bundle", "session_options are of ONNX Runtime's sessions, and backend is openvino"):
        load(tiny_bundle(), backend="openvino", session_options={"intra_op_num_threads": 1})
    with refused("load bundle", "profile are of ONNX Runtime's sessions"):
        load(tiny_bundle(), backend="openvino", profile=tmp_path)
    with refused("load bundle", "backend is 'tvm'; use onnxruntime or openvino"):
        load(tiny_bundle(), backend="tvm")


def test_without_it_the_remedy_is_told(
    tiny_bundle: Callable[..., Path], refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with refused("load graph", "the backend openvino needs OpenVINO", "pip install 'stillgraph[openvino]'"):
        load(tiny_bundle(), backend="openvino")
