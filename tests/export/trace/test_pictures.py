"""Graphs of a model that sees, against transformers: features, prompts with pictures, and text from them.

The small LLaVA has 10 tokens a picture, a prefill of 16 tokens and a window of 5 in its second layer, so a
picture is cut by the edges of chunks. Shapes: T features of a picture, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillgraph import load
from stillgraph.cli import main
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.validate import image
from stillgraph.exporter.validate.report import Parity
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read

FP32 = 1e-5  # sums in another order
T, P, CTX = 10, 16, 40
LLAVA: dict[str, Any] = {"family": "llava"}
ORT: dict[str, Any] = {"target": "onnxruntime"}
TEXT: dict[str, Any] = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 272,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
}
BUNDLES: dict[str, dict[str, Any]] = {
    "portable": LLAVA,
    "fused": LLAVA | ORT,
    "portable, before a Llama, head not tied": LLAVA | TEXT | {"tie_word_embeddings": False},
    "fused, before a Llama": LLAVA | ORT | TEXT,
}
TOWERS: dict[str, dict[str, Any]] = {
    "all tokens of the last layer": {},
    "patches alone, of the layer before the last": {
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
    },
    "two layers side by side": {"vision_feature_layer": [0, -1]},
}
Bundle = Callable[..., Path]


def quiet(line: str) -> None: ...


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("optimized", [False, True])
def test_features(tiny_bundle: Bundle, original: Any, name: str, optimized: bool) -> None:
    bundle = tiny_bundle([("decode", 1, CTX)], **LLAVA, **TOWERS[name])
    manifest = read(bundle)
    vision = manifest.model.vision
    assert vision is not None
    pixels = torch.from_numpy(image.pixels(vision))
    with torch.no_grad():
        expected = (
            original(manifest.source.id).get_image_features(pixel_values=pixels).pooler_output[0].numpy()
        )
    found = image.features(bundle, manifest, optimized)
    assert found.shape == expected.shape == (vision.image_tokens, manifest.model.hidden_size)
    assert np.abs(found - expected).max() <= FP32 * np.abs(expected).max()


@pytest.mark.parametrize("name", BUNDLES)
@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("<image>", 1),
        ("a<image>bc", 1),
        ("twelve bytes<image>d", 1),
        ("<image><image>", 2),
        ("ab<image>c<image>", 2),
    ],
)
def test_text_from_pictures(
    tiny_bundle: Bundle, name: str, prompt: str, count: int, drawn: Any, follows: Any
) -> None:
    bundle = tiny_bundle(**BUNDLES[name])
    checkpoint = read(bundle).source.id
    images = [drawn(seed) for seed in range(count)]
    engine = load(bundle, threads=1)
    steps = list(engine.stream(prompt, images=images, max_new_tokens=12, stop_tokens=()))
    assert follows(steps, checkpoint, engine.ids(prompt), images, 12)
    others = list(engine.stream(prompt, images=[drawn(9)] * count, max_new_tokens=12, stop_tokens=()))
    assert [step.logprob for step in others] != [step.logprob for step in steps]
    again = list(engine.stream(prompt, images=images, max_new_tokens=12, stop_tokens=()))
    assert [step.token for step in again] == [step.token for step in steps]


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_sixty_four_tokens_after_pictures(tiny_bundle: Bundle, drawn: Any, follows: Any, target: str) -> None:
    """Far past the window, and on to the last slot of the cache."""
    ctx = 1 + 3 + 2 * T + 64 - 1  # the last token is made and not fed
    # A seed whose tokens vary, and with the pictures.
    bundle = tiny_bundle([("prefill", P, ctx), ("decode", 1, ctx)], target=target, seed=1, **LLAVA)
    engine = load(bundle, threads=1)
    prompt, images = "ab<image>c<image>", [drawn(1), drawn(2)]
    steps = list(engine.stream(prompt, images=images, max_new_tokens=64, stop_tokens=()))
    assert follows(steps, read(bundle).source.id, engine.ids(prompt), images, 64)
    others = engine.stream(prompt, images=images[::-1], max_new_tokens=64, stop_tokens=())
    assert [step.token for step in others] != [step.token for step in steps]


def test_a_row_nobody_asked_for_does_not_spoil_its_picture(tiny_bundle: Bundle, drawn: Any) -> None:
    """It holds a copy of a prompt that ends in a picture, and each step writes something behind that."""
    bundle, prompt, images = tiny_bundle(batch=2, **LLAVA), "ab<image>", [drawn(1)]
    engine = load(bundle, threads=1)
    first = [step.logprob for step in engine.stream(prompt, images=images, max_new_tokens=3)]
    rows = engine.stream_batch([prompt] * 2, images=[images] * 2, max_new_tokens=3)
    found: list[list[float]] = [[], []]
    for row, step in rows:
        found[row].append(step.logprob)
    np.testing.assert_allclose(found, [first, first], atol=FP32)


def test_one_graph_at_a_time_gives_the_same(tiny_bundle: Bundle, drawn: Any) -> None:
    bundle, prompt, images = tiny_bundle(**LLAVA), "ab<image>c<image>", [drawn(1), drawn(2)]
    texts = []
    for unload in (False, True):
        engine = load(bundle, threads=1, unload_prefill=unload)
        for given in (images, images[::-1], images):
            texts.append([step.logprob for step in engine.stream(prompt, images=given, max_new_tokens=5)])
    assert texts[:3] == texts[3:]
    assert texts[0] == texts[2] != texts[1]


def test_every_weight_is_stored_once(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle(**LLAVA)
    manifest = read(bundle)
    assert set(manifest.graphs) == {"prefill-16", "embed-16", "decode-40", "vision"}
    tensors = load_file(Path(manifest.source.id) / "model.safetensors")
    used = {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name}
    assert sum(place.nbytes for place in manifest.weights.tensors.values()) == sum(
        tensor.nbytes for tensor in used.values()
    )


@pytest.fixture
def own(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(**LLAVA), tmp_path / "bundle"))


def test_validation_covers_pictures(own: Path) -> None:
    parity = validate(own, say=quiet)
    assert parity.passed
    seen = [case for case in parity.cases if case.text == "picture"]
    assert {case.optimized for case in seen} == {False, True}
    assert min(case.prompt for case in seen) == image.end(vision_of(own)) + 1
    assert parity.max_feature_error is not None
    assert 0 < parity.max_feature_error <= FP32
    assert json.loads((own / "reports" / "parity.json").read_text())
    assert Parity.model_validate_json((own / "reports" / "parity.json").read_text()) == parity


def vision_of(bundle: Path) -> Any:
    return read(bundle).model.vision


def test_validation_fails_for_a_picture_in_another_place(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = image.fill
    monkeypatch.setattr(image, "fill", lambda rows, first, features: fill(rows, first + 1, features))
    parity = validate(own, depth="quick", say=quiet)
    assert not parity.passed
    broken = [case for case in parity.cases if not parity.within_bound(case)]
    assert {case.text for case in broken} == {"picture"}


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_weights_of_few_bits(tiny_bundle: Bundle, tmp_path: Path, target: str) -> None:
    """The tower's products are int8, the decoder's int4; the graphs compute what those weights mean."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = {"model_type": "qwen2", "vocab_size": 272, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = {**LLAVA, "text_config": text | wide}
    bundle = shutil.copytree(tiny_bundle(target=target, precision="int4", **config), tmp_path / "own")
    names = set(read(bundle).weights.tensors)
    assert any("vision_tower" in name and ".int8." in name for name in names)
    assert not any("vision_tower" in name and ".int4." in name for name in names)
    assert not any("position_embedding" in name and ".int" in name for name in names)
    parity = validate(bundle, depth="quick", say=quiet)
    assert all(parity.within_bound(case) for case in parity.cases), parity.problem()


@pytest.mark.parametrize(
    ("prompt", "count", "words"),
    [
        ("no mark", 1, ["room for 0 pictures", "1 images", "<image> once"]),
        ("<image> and <image>", 1, ["room for 2 pictures", "1 images"]),
        ("<image>", 0, ["room for 1 pictures", "0 images"]),
    ],
)
def test_marks_and_images_differ(
    tiny_bundle: Bundle, refused: Any, prompt: str, count: int, words: list[str], drawn: Any
) -> None:
    engine = load(tiny_bundle(**LLAVA), threads=1)
    with refused("read prompt", *words):
        engine.stream(prompt, images=[drawn(0)] * count)


def test_an_image_for_a_model_of_text_alone(tiny_bundle: Bundle, refused: Any, drawn: Any) -> None:
    engine = load(tiny_bundle(), threads=1)
    with refused("read prompt", "1 images", "text alone"):
        engine.stream("abc", images=[drawn(0)])


def test_a_bundle_without_a_vision_graph(
    tiny_checkpoint: Any, tmp_path: Path, refused: Any, drawn: Any
) -> None:
    from stillgraph.exporter.bundle.build import export
    from stillgraph.exporter.config import request
    from stillgraph.spec import GraphShape

    config = request(
        model=str(tiny_checkpoint(family="llava")), target="portable", precision="fp32", batch=1, out=tmp_path
    )
    shapes = [GraphShape(role="prefill", max_len=P, ctx=CTX), GraphShape(role="decode", max_len=1, ctx=CTX)]
    export(config, shapes, replace=False, say=quiet)
    engine = load(tmp_path, threads=1)
    assert list(engine.stream("abc", max_new_tokens=2))
    with refused("read prompt", "no vision graph", "stillgraph export vision"):
        engine.stream("<image>", images=[drawn(0)])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.onnx")}
    export(config, [], replace=False, say=quiet, vision=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert list(load(tmp_path, threads=1).stream("<image>", images=[drawn(0)], max_new_tokens=2))


def test_no_room_for_a_picture(tiny_bundle: Bundle, refused: Any) -> None:
    with refused("export", "--ctx 10", "picture of 10 tokens"):
        tiny_bundle([("prefill", 8, 10), ("decode", 1, 10)], **LLAVA)
    with refused("export", "--max-len 8 without --ctx", "picture of 10 tokens"):
        tiny_bundle([("prefill", 8, None), ("decode", 1, 40)], **LLAVA)


UNSUPPORTED = [
    ({"text_config": {"model_type": "mistral"}}, "language model of type 'mistral'"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower of type 'siglip_vision_model'"),
    ({"vision_feature_layer": 7}, "vision_feature_layer 7 of a tower of 3 layers"),
]


@pytest.mark.parametrize(("values", "words"), UNSUPPORTED)
def test_what_is_not_supported_is_named(
    tiny_checkpoint: Any, tmp_path: Path, refused: Any, values: dict[str, Any], words: str
) -> None:
    own = shutil.copytree(tiny_checkpoint(family="llava"), tmp_path / "own")
    raw = json.loads((own / "config.json").read_text()) | values
    (own / "config.json").write_text(json.dumps(raw))
    with refused("read checkpoint", words, "not supported"):
        open_checkpoint(str(own))


def test_the_command_line_takes_pictures(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: Any
) -> None:
    """A plain prompt has the marks itself; a chat has them put before the question."""
    bundle, images = tiny_bundle(**LLAVA), [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(images):
        drawn(seed).save(path)
    first, second = (["--image", str(path)] for path in images)
    lines = []
    for options in (["--prompt", "<image><image>", *first, *second], ["--chat", "--prompt", "?", *first]):
        assert main(["run", str(bundle), *options, "--max-new-tokens", "2", "--json", "--quiet"]) == 0
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0]["prompt_tokens"] == 2 * T + 1  # and the begin token
    assert T + len("\n?") < lines[1]["prompt_tokens"] < 2 * T + 20
    arguments = ["run", str(bundle), "--prompt", "<image>", "--image", str(tmp_path / "none.png")]
    assert main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
