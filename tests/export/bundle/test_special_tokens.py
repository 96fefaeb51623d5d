"""The manifest's special tokens: a model stops where transformers stops it, whichever file says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillgraph.calling import Tokens
from stillgraph.exporter.bundle.calling import tokens
from stillgraph.exporter.checkpoint import open_checkpoint

Refused = Callable[..., Any]
GENERATION = "generation_config.json"


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`model(family, generation, config)`: a checkpoint with these tokens in its files, and no others.

    generation: of generation_config.json, which is not there where it is None; config: of config.json, and
    under text_config of the text model's.
    """

    def make(family: str, generation: dict[str, Any] | None, config: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(tiny_checkpoint(family=family), tmp_path / "model"))
        (folder / GENERATION).unlink()
        if generation is not None:
            (folder / GENERATION).write_text(json.dumps(generation))
        raw = json.loads((folder / "config.json").read_text())
        for part in (raw, raw.get("text_config", {})):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                part.pop(name, None)
        inner = (
            {"text_config": raw.get("text_config", {}) | config["text_config"]}
            if "text_config" in config
            else {}
        )
        (folder / "config.json").write_text(json.dumps(raw | config | inner))
        return folder

    return make


def found(folder: Path) -> Tokens:
    return tokens(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma3_vision", {"text_config": {"eos_token_id": [1, 5], "bos_token_id": 3, "pad_token_id": 4}}),
        ("gemma3_vision", {"eos_token_id": 7, "text_config": {"eos_token_id": [1, 5]}}),
        ("llava", {"text_config": {"eos_token_id": 6, "bos_token_id": 2, "pad_token_id": 0}}),
        ("llama", {"eos_token_id": [1, 9], "bos_token_id": 2, "pad_token_id": 8}),
        ("llama", {"eos_token_id": 1}),
    ],
)
def test_without_generation_config_they_are_transformers_reading_of_the_config(
    model: Callable[..., Path], original: Any, family: str, config: dict[str, Any]
) -> None:
    folder = model(family, None, config)
    expected, ours = original(str(folder)).generation_config, found(folder)
    stop = expected.eos_token_id
    assert ours.stop == (tuple(stop) if isinstance(stop, list) else (stop,))
    assert ours.bos == (2 if expected.bos_token_id is None else expected.bos_token_id)  # the tokenizer's
    assert expected.pad_token_id in (None, ours.pad)


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}])
def test_what_no_config_says_is_the_tokenizers(
    model: Callable[..., Path], caplog: Any, generation: dict[str, Any] | None
) -> None:
    """transformers then never stops: `generate` gets no token that ends a text."""
    silent = {"eos_token_id": None, "bos_token_id": None}
    folder = model("llama", generation, silent)
    assert (found(folder).bos, found(folder).stop, found(folder).tokenizer_adds_bos) == (2, (1,), True)
    assert not caplog.records
    (folder / "tokenizer.json").unlink()
    assert (found(folder).bos, found(folder).stop) == (None, ())
    assert "names no token that ends a text" in caplog.text


@pytest.mark.parametrize(
    ("pad", "expected"),
    [(-1, 0), (None, 0), ([7, 8], 7), ([-1, 8], 8), (272, 0), (10**6, 0), ("<pad>", 0), (True, 0), (3, 3)],
)
def test_a_pad_token_is_one_that_there_is(model: Callable[..., Path], pad: object, expected: int) -> None:
    """No result depends on it, so none is refused: the tokenizer's is 0."""
    folder = model("llama", {"eos_token_id": 5, "pad_token_id": pad}, {})
    assert found(folder).pad == expected


def test_without_any_pad_token_it_is_one_that_ends_a_text(model: Callable[..., Path]) -> None:
    folder = model("llama", {"eos_token_id": [5, 6], "pad_token_id": -1}, {})
    (folder / "tokenizer.json").unlink()
    assert found(folder).pad == 5


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"eos_token_id": [1, 272]}, ("stop", "272", "vocabulary")),
        ({"eos_token_id": -1}, ("stop", "-1")),
        ({"eos_token_id": 1, "bos_token_id": 300}, ("bos", "300", "vocabulary has 272")),
        ({"eos_token_id": [[1]]}, ("stop",)),
    ],
)
def test_what_is_no_token_is_refused(
    model: Callable[..., Path], refused: Refused, generation: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused("read checkpoint", GENERATION, *words):
        found(model("llama", generation, {}))


def test_those_of_generation_config_come_first(model: Callable[..., Path]) -> None:
    folder = model("gemma3_vision", {"eos_token_id": [5, 1]}, {"text_config": {"eos_token_id": 7}})
    assert found(folder).stop == (5, 1)
