"""A bundle's tokenizer is transformers', whichever files a checkpoint spreads its own over."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stillgraph.exporter.bundle.tokenizer_files import write_tokenizer
from stillgraph.exporter.checkpoint_folder import SHIPPED
from stillgraph.tokenizer import Text
from tests.export.bundle.tokenizer_styles import (
    NAMES,
    PLAIN,
    assert_encodes_as,
    byte_level,
    publish,
    ship,
    unigram,
    word_level,
)

Refused = Callable[..., Any]
NEW = {"content": "<new>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
STYLES: dict[str, dict[str, Any]] = {
    "one file": {},
    "special_tokens_map": {
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map": NAMES | {"mask_token": NEW | {"content": "<mask>"}},
    },
    "no config": {"tokenizer_config": None, "config": {"model_type": "olmo2"}, "special_tokens_map": NAMES},
    "added_tokens": {"added_tokens": {"<new>": 900, "<more>": 901}},
    "added_tokens_decoder": {
        "tokenizer_config": PLAIN
        | {
            "added_tokens_decoder": {
                "1": NEW | {"content": "<eos>", "special": True},
                "900": NEW | {"special": False},
            }
        }
    },
    "additional_special_tokens": {
        "tokenizer_config": PLAIN | {"additional_special_tokens": ["<new>", "<more>"]}
    },
    "extra_special_tokens": {"tokenizer_config": PLAIN | {"extra_special_tokens": ["<one>"]}},
    "named extra_special_tokens": {
        "tokenizer_config": PLAIN | {"extra_special_tokens": {"image_token": "<one>"}, "audio_token": "<two>"}
    },
    "an object for a name": {"tokenizer_config": PLAIN | {"mask_token": NEW | {"__type": "AddedToken"}}},
}

# The module: transformers has a function of its name as well, which is found first once it was used.
CONVERTER = importlib.import_module("transformers.convert_slow_tokenizer")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [byte_level, word_level, unigram])
def test_the_files_are_merged_into_one_tokenizer(tmp_path: Path, kind: Any, style: str) -> None:
    source = publish(tmp_path / "source", kind(), **STYLES[style])
    bundle = ship(source)
    theirs = AutoTokenizer.from_pretrained(source)
    text = Text(bundle)
    assert_encodes_as(text, theirs)
    assert {path.name for path in bundle.iterdir()} <= {"tokenizer.json", "tokenizer_config.json"}
    assert Tokenizer.from_file(str(bundle / "tokenizer.json")).get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("demo", SHIPPED)
def test_a_file_that_says_all_is_copied(tmp_path: Path, demo: str) -> None:
    source = SHIPPED[demo]
    write_tokenizer(source, tmp_path, demo == "demo-vision", lambda line: None)
    assert len(list(tmp_path.iterdir())) == 3
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    bundle = ship(publish(tmp_path / "source", None))
    assert [path.name for path in bundle.iterdir()] == ["tokenizer_config.json"]


def digits_joined() -> Tokenizer:
    """A byte-level tokenizer with a rule of its own, before a vocabulary in which digits are joined."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True)).pre_tokenizer
    return tokenizer


BROKEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "Gemma": (byte_level, {"tokenizer_config": PLAIN | {"tokenizer_class": "GemmaTokenizer"}}),
    "Gemma, not BPE": (unigram, {"tokenizer_config": PLAIN | {"tokenizer_class": "GemmaTokenizer"}}),
    "Gemma's config": (
        byte_level,
        {"tokenizer_config": None, "special_tokens_map": NAMES, "config": {"model_type": "gemma3_text"}},
    ),
    "GPT2": (digits_joined, {"tokenizer_config": PLAIN | {"tokenizer_class": "GPT2Tokenizer"}}),
    "Qwen2": (
        word_level,
        {
            "tokenizer_config": PLAIN | {"tokenizer_class": "Qwen2Tokenizer"},
            "config": {"model_type": "qwen2"},
        },
    ),
}


@pytest.mark.parametrize("label", BROKEN)
def test_what_transformers_breaks_is_kept_and_told(tmp_path: Path, caplog: Any, label: str) -> None:
    kind, files = BROKEN[label]
    source = publish(tmp_path / "source", kind(), **files)
    bundle = ship(source)
    assert (bundle / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    text, alone = (
        Text(bundle),
        PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **NAMES),
    )
    assert_encodes_as(text, alone)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the file is kept" in record.message
    assert_encodes_as(
        text, PreTrainedTokenizerFast.from_pretrained(bundle)
    )  # for whom the bundle is a folder


def test_a_label_that_changes_no_id_is_no_warning(tmp_path: Path, caplog: Any) -> None:
    """As SmolLM 2 has it: GPT 2's class drops the rule for digits, and no piece joins digits."""
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    source = publish(
        tmp_path / "source", tokenizer, tokenizer_config=PLAIN | {"tokenizer_class": "GPT2Tokenizer"}
    )
    theirs = AutoTokenizer.from_pretrained(source)
    assert type(theirs).__name__ == "GPT2Tokenizer"
    bundle = ship(source)
    assert (bundle / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert_encodes_as(Text(bundle), theirs)
    assert not caplog.records


def slow_files(folder: Path, label: str) -> Path:
    """vocab.json and merges.txt of a byte-level BPE."""
    publish(folder, None, tokenizer_config=PLAIN | {"tokenizer_class": label})
    byte_level().model.save(str(folder))
    return folder


def test_vocabulary_and_merges_become_one_file(tmp_path: Path) -> None:
    source = slow_files(tmp_path / "source", "GPT2Tokenizer")
    assert_encodes_as(Text(ship(source)), AutoTokenizer.from_pretrained(source))


@pytest.mark.parametrize("label", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_vocabulary_that_nothing_reads_is_refused(tmp_path: Path, label: str, refused: Refused) -> None:
    with refused("read tokenizer", "vocab.json"):
        ship(slow_files(tmp_path / "source", label))


def sentencepiece(folder: Path) -> Path:
    """tokenizer.model: pieces with scores, as SentencePiece writes them."""
    from transformers.utils import sentencepiece_model_pb2_new as pb2

    publish(folder, None, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    proto = pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581t", "he", "\u2581the", *"\u2581the boykit"]
    for index, piece in enumerate(dict.fromkeys(pieces)):
        byte = piece.startswith("<0x")
        proto.pieces.add(piece=piece, score=-float(index), type=kinds.get(piece, 6 if byte else 1))
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def test_sentencepiece_without_its_package_is_refused(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONVERTER, "is_sentencepiece_available", lambda: False)
    with refused("read tokenizer", "tokenizer.model", "install"):
        ship(sentencepiece(tmp_path / "source"))


def test_sentencepiece_becomes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONVERTER, "requires_backends", lambda *_: None)
    source = sentencepiece(tmp_path / "source")
    text, theirs = Text(ship(source)), AutoTokenizer.from_pretrained(source)
    assert_encodes_as(text, theirs)
    assert len(text.encode("the boy", special=False)) < 7


def test_an_unreadable_file_is_refused(tmp_path: Path, refused: Refused) -> None:
    source = publish(tmp_path / "source", byte_level())
    (source / "tokenizer.json").write_text("{")
    with refused("read tokenizer", "tokenizer.json", "download"):
        ship(source)


def test_a_difference_is_refused_with_its_text(tmp_path: Path, refused: Refused) -> None:
    """What tokenizer.json cannot say: special tokens in a text are text."""
    source = publish(
        tmp_path / "source", byte_level(), tokenizer_config=PLAIN | {"split_special_tokens": True}
    )
    with refused("read tokenizer", "'a<pad>b'", "transformers'"):
        ship(source)


def test_tokens_that_take_the_spaces_beside_them(tmp_path: Path) -> None:
    """The override is seen in ids: the file alone leaves the spaces to be tokens."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<new>")])
    key = str(tokenizer.token_to_id("<new>"))
    source = publish(
        tmp_path / "source",
        tokenizer,
        tokenizer_config=PLAIN | {"added_tokens_decoder": {key: NEW | {"special": True}}},
    )
    text = Text(ship(source))
    assert len(text.encode("a  <new>  b", special=False)) == 3
    assert len(tokenizer.encode("a  <new>  b", add_special_tokens=False).ids) == 7
    assert_encodes_as(text, AutoTokenizer.from_pretrained(source))
