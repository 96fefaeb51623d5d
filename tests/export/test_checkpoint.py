"""Reading a checkpoint: what is found, and one sentence for each way in which it can be bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.checkpoint_folder import DEMO

Refused = Callable[..., AbstractContextManager[None]]
Edit = Callable[[dict[str, Any]], object]
STAGE, WEIGHTS, HEAD = "read checkpoint", "model.safetensors", "model.embed_tokens.weight"


@pytest.fixture
def own(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(tiny_checkpoint(), tmp_path / "own")


def edit_config(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(raw))


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_good_one(own: Path) -> None:
    checkpoint = open_checkpoint(str(own))
    spec = checkpoint.spec
    assert (spec.num_attention_heads, {(layer.kv_heads, layer.head_dim) for layer in spec.layers}) == (
        4,
        {(2, 24)},
    )
    assert [(layer.kind, layer.window) for layer in spec.layers] == [
        ("sliding_attention", 5),
        ("full_attention", None),
    ]
    tensors = load_file(own / WEIGHTS)
    assert set(checkpoint.tensors) == set(tensors)
    assert torch.equal(checkpoint.tensor(HEAD), tensors[HEAD])


def test_a_tied_head_may_be_stored_all_the_same(own: Path) -> None:
    edit_tensors(own, lambda tensors: tensors.update({"lm_head.weight": tensors[HEAD].clone()}))
    checkpoint = open_checkpoint(str(own))
    assert checkpoint.tied == HEAD
    assert "lm_head.weight" not in checkpoint.tensors


def test_weights_in_several_files(own: Path) -> None:
    tensors = load_file(own / WEIGHTS)
    (own / WEIGHTS).unlink()
    names, index = sorted(tensors), {}
    for part in range(3):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, own / file)
        index |= dict.fromkeys(names[part::3], file)
    (own / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    checkpoint = open_checkpoint(str(own))
    assert all(torch.equal(checkpoint.tensor(name), tensors[name]) for name in names)


def test_the_hash_follows_config_and_weights(own: Path) -> None:
    first = open_checkpoint(str(own)).sha256
    assert open_checkpoint(str(own)).sha256 == first
    edit_tensors(own, lambda tensors: tensors[HEAD].add_(1e-3))
    second = open_checkpoint(str(own)).sha256
    edit_config(own, rms_norm_eps=1e-5)
    assert len({first, second, open_checkpoint(str(own)).sha256}) == 3


def test_building_reserves_memory_and_reads_no_weight(own: Path) -> None:
    checkpoint = open_checkpoint(str(own))
    (own / WEIGHTS).unlink()
    model = checkpoint.build("eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_demo_ships_inside_the_package() -> None:
    assert open_checkpoint("demo").folder == DEMO
    assert Path(__file__).parents[2] in DEMO.parents


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_no_such_folder(refused: Refused, name: str) -> None:
    with refused(STAGE, f"{name}: no such folder", "hub id"):
        open_checkpoint(name)


def test_the_hub_does_not_give_it(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("a long story\nin many lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with refused(STAGE, "someone/model", "ConnectionError", "network"):
        open_checkpoint("someone/model")


def test_no_config(own: Path, refused: Refused) -> None:
    (own / "config.json").unlink()
    with refused(STAGE, "config.json is missing", "name a folder"):
        open_checkpoint(str(own))


@pytest.mark.parametrize("content", ["{", "", "[1]", '"text"', "\udcff"])
def test_config_is_not_json(own: Path, refused: Refused, content: str) -> None:
    (own / "config.json").write_text(content, errors="surrogateescape")
    with refused(STAGE, "config.json is not", "download the file again"):
        open_checkpoint(str(own))


def test_config_is_a_folder(own: Path, refused: Refused) -> None:
    (own / "config.json").unlink()
    (own / "config.json").mkdir()
    with refused(STAGE, "config.json", "Is a directory"):
        open_checkpoint(str(own))


def rope(kind: str, **values: Any) -> dict[str, Any]:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    return {"rope_parameters": {"full_attention": plain, "sliding_attention": plain} | {kind: plain | values}}


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM'"),
    ({"architectures": None}, "architecture None"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"layer_types": ["chunked_attention", "full_attention"]}, "layer type 'chunked_attention'"),
    (rope("full_attention", rope_type="yarn", factor=4.0), "RoPE type 'yarn' of its full_attention layers"),
    (
        rope("sliding_attention", rope_type="dynamic", factor=4.0),
        "RoPE type 'dynamic' of its sliding_attention",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "RoPE type 'yarn' of its full_attention"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "'type' in place of 'rope_type'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "without a part for each layer kind"),
    ({"sliding_window": None}, "sliding_window None with sliding layers"),
    ({"sliding_window": -3}, "sliding_window -3 with sliding layers"),
    ({"num_key_value_heads": 3}, "4 heads over 3 key/value heads"),
]


@pytest.mark.parametrize(("values", "reason"), UNSUPPORTED, ids=[reason for _, reason in UNSUPPORTED])
def test_what_the_graphs_would_get_wrong(
    own: Path, refused: Refused, values: dict[str, Any], reason: str
) -> None:
    edit_config(own, **values)
    with refused(STAGE, str(own), reason, "not supported"):
        open_checkpoint(str(own))


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["nonsense", "full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"hidden_activation": "nonsense"}, "nonsense"),
    ({"vocab_size": -1}, "-1"),
    (rope("full_attention", rope_type="linear", factor="x"), "str"),
]


@pytest.mark.parametrize(("values", "word"), INVALID, ids=[str(values) for values, _ in INVALID])
def test_config_that_makes_no_sense(own: Path, refused: Refused, values: dict[str, Any], word: str) -> None:
    edit_config(own, **values)
    with refused(STAGE, "config.json is not valid", word, "fix config.json"):
        open_checkpoint(str(own))


NORM = "model.layers.1.self_attn.q_norm.weight"
MISFITS: list[tuple[Edit, tuple[str, ...]]] = [
    (lambda tensors: tensors.pop(NORM), ("lacks tensor", NORM)),
    (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".mlp." in name],
        ("lacks", "and 5 more"),
    ),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), ("has unknown tensor extra",)),
    (lambda tensors: tensors.update({NORM: torch.zeros(25)}), (NORM, "shape [25]", "[24]")),
    (lambda tensors: tensors.update({HEAD: tensors[HEAD].t().contiguous()}), ("[48, 272]", "[272, 48]")),
]


@pytest.mark.parametrize(("edit", "words"), MISFITS, ids=[" ".join(words) for _, words in MISFITS])
def test_tensors_that_do_not_fit(own: Path, refused: Refused, edit: Edit, words: tuple[str, ...]) -> None:
    edit_tensors(own, edit)
    with refused(STAGE, *words, "config.json"):
        open_checkpoint(str(own))


@pytest.mark.parametrize("keep", [0, 5, 2_000, -1])
def test_weights_cut_short(own: Path, refused: Refused, keep: int) -> None:
    content = (own / WEIGHTS).read_bytes()
    (own / WEIGHTS).write_bytes(content[:keep])
    with refused(STAGE, WEIGHTS, "damaged or cut short", "download the file again"):
        open_checkpoint(str(own))


def test_no_weights(own: Path, refused: Refused) -> None:
    (own / WEIGHTS).unlink()
    with refused(STAGE, f"{WEIGHTS} is missing"):
        open_checkpoint(str(own))


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors is missing"),
        (
            {"weight_map": {"a": "../b.safetensors"}},
            "names '../b.safetensors' as a file",
        ),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd' as a file"),
        ({"weight_map": {"a": 5}}, "names 5 as a file"),
        ({}, "weight_map"),
    ],
)
def test_an_index_of_files_that_are_not_there(
    own: Path, refused: Refused, index: dict[str, Any], word: str
) -> None:
    (own / WEIGHTS).unlink()
    (own / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with refused(STAGE, word):
        open_checkpoint(str(own))


@pytest.mark.parametrize("family", ["llava", "gemma3_vision"])
def test_names_of_published_checkpoints(
    tiny_checkpoint: Any, original: Any, tmp_path: Path, family: str
) -> None:
    """Those on the hub were saved before transformers called its modules as it does now."""
    first = tiny_checkpoint(family=family)
    own = shutil.copytree(first, tmp_path / "own")
    tensors = load_file(first / "model.safetensors")
    former = {former_name(name): tensor for name, tensor in tensors.items()}
    assert not set(former) & set(tensors)
    save_file(former, own / "model.safetensors", metadata={"format": "pt"})
    ours = open_checkpoint(str(own))
    assert all(torch.equal(ours.tensor(name), tensor) for name, tensor in tensors.items())
    parameters = dict(original(str(own)).named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())


def former_name(name: str) -> str:
    for now, then in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(now):
            return then + name.removeprefix(now)
    raise AssertionError(name)
