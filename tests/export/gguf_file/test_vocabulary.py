"""Vocabularies of GGUF files. The expected ids follow from llama.cpp's rules, which each test says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from stillgraph.exporter.gguf_file.header import read_header
from stillgraph.exporter.gguf_file.unpack import unpack
from stillgraph.exporter.gguf_file.vocabulary import CUTS, Vocabulary
from tests.gguf_writer import write_bare

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACED = "\u0120"  # a space in the alphabet of bytes


class Tokens:
    """The tokenizer of a GGUF with these tokens."""

    def __init__(self, path: Path, **keys: Any) -> None:
        self.vocabulary = Vocabulary.of(read_header(write_bare(path, **keys)))
        self.tokenizer = Tokenizer.from_str(json.dumps(self.vocabulary.tokenizer()))

    def cut(self, text: str, special: bool = False) -> list[str]:
        return self.tokenizer.encode(text, add_special_tokens=special).tokens


@pytest.fixture
def byte_level(tmp_path):
    """`byte_level(pre, tokens, merges=[])`: after the four special ones, before a pair that is merged."""

    def make(pre: str, tokens: list[str], merges: list[str] | None = None, **keys: Any) -> Tokens:
        tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *tokens, "y", "z", "yz"]
        own = {
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [CONTROL] * 4 + [NORMAL] * (len(tokens) - 4),
            "tokenizer.ggml.merges": [*(merges or []), "y z"],
        }
        return Tokens(tmp_path / "m.gguf", **own | keys)

    return make


@pytest.fixture
def pieces(tmp_path):
    """`pieces({token: score}, types={token: type})`: a sentencepiece vocabulary with every byte."""

    def make(scores: dict[str, float], types: dict[str, int] | None = None, **keys: Any) -> Tokens:
        scores = {"<pad>": 0.0, "<eos>": 0.0, "<bos>": 0.0, "<unk>": 0.0} | scores
        scores |= {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
        kinds = dict.fromkeys(scores, NORMAL) | dict.fromkeys(("<pad>", "<eos>", "<bos>"), CONTROL)
        kinds |= {"<unk>": UNKNOWN} | {name: BYTE for name in scores if name[:3] == "<0x"} | (types or {})
        return Tokens(
            tmp_path / "m.gguf",
            **{
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": list(scores),
                "tokenizer.ggml.scores": list(scores.values()),
                "tokenizer.ggml.token_type": list(kinds.values()),
                "tokenizer.ggml.merges": None,
            },
            **keys,
        )

    return make


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12345"]),  # digits are a word
        ("smollm", list("12345")),  # each is one
        ("qwen2", list("12345")),
        ("tekken", list("12345")),
        ("llama-bpe", ["123", "45"]),  # up to three are one
    ],
)
def test_digits_are_cut_as_the_pre_tokenizer_says(byte_level, pre: str, expected: list[str]) -> None:
    tokens = [*"12345", "12", "123", "45", "12345"]
    merges = ["1 2", "4 5", "12 3", "123 45"]
    assert byte_level(pre, tokens, merges).cut("12345") == expected


def test_a_word_that_is_a_token_needs_no_merges_where_llama_cpp_ignores_them(byte_level) -> None:
    assert byte_level("llama-bpe", [*"abc", "ab", "abc"], ["a b"]).cut("abc") == ["abc"]
    assert byte_level("gpt-2", [*"abc", "ab", "abc"], ["a b"]).cut("abc") == ["ab", "c"]


def test_every_space_is_kept(byte_level) -> None:
    made = byte_level("gpt-2", ["a", SPACED, SPACED + "a"], [f"{SPACED} a"])
    assert made.cut("  a ") == [SPACED, SPACED + "a", SPACED]
    assert made.tokenizer.decode(made.tokenizer.encode("  a ").ids) == "  a "


@pytest.mark.parametrize(
    ("pre", "key", "expected"),
    [
        ("gpt-2", None, []),
        ("llama-bpe", None, ["<bos>"]),
        ("llama-bpe", False, []),
        ("gpt-2", True, ["<bos>"]),
    ],
)
def test_the_begin_token_is_added_where_the_file_or_else_llama_cpp_says_so(
    byte_level, pre: str, key: bool | None, expected: list[str]
) -> None:
    made = byte_level(
        pre, ["a"], **{"tokenizer.ggml.add_bos_token": key, "tokenizer.ggml.add_eos_token": True}
    )
    assert made.cut("a", special=True) == [*expected, "a", "<eos>"]


def test_special_tokens_are_matched_whole_in_any_alphabet(byte_level) -> None:
    """As DeepSeek's are written, which are no bytes of a byte-level vocabulary; and they end a text."""
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    types = [CONTROL] * 4 + [NORMAL, NORMAL, CONTROL, USER_DEFINED, NORMAL, NORMAL, NORMAL]
    made = byte_level("qwen2", [*"ab", end, "<b>"], **{"tokenizer.ggml.token_type": types})
    assert made.cut(f"a{end}<b>b") == ["a", end, "<b>", "b"]
    assert made.tokenizer.decode([4, 6, 7, 5]) == "a<b>b"
    assert made.vocabulary.stop == [1, 6]


def test_the_ends_of_a_turn_that_keys_name_come_after_the_end_of_a_text(byte_level) -> None:
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 4}
    assert byte_level("qwen2", [*"ab"], **keys).vocabulary.stop == [1, 5, 4]


def test_pieces_are_joined_by_their_scores(pieces) -> None:
    """llama.cpp joins the pair that makes the token of the highest score first."""
    scores = {"a": 0.0, "b": 0.0, "c": 0.0, "ab": -2.0, "bc": -1.0, "abc": -3.0, "\u2581": 0.0}
    off = {"tokenizer.ggml.add_space_prefix": False}
    assert pieces(scores, **off).cut("abc") == ["abc"]  # a and bc
    del scores["abc"]
    assert pieces(scores, **off).cut("abc") == ["a", "bc"]
    assert pieces(scores | {"ab": -0.5}, **off).cut("abc") == ["ab", "c"]


def test_a_text_begins_with_a_space_unless_the_file_says_otherwise(pieces) -> None:
    scores = {"\u2581": 0.0, "a": 0.0, "\u2581a": -1.0}
    made = pieces(scores)
    assert made.cut("a a<eos>a", special=True) == ["<bos>", "\u2581a", "\u2581a", "<eos>", "\u2581a"]
    assert made.tokenizer.decode(made.tokenizer.encode("a a").ids) == "a a"
    off = pieces(scores, **{"tokenizer.ggml.add_space_prefix": False})
    assert off.cut("a a", special=True) == ["<bos>", "a", "\u2581a"]
    assert off.tokenizer.decode(off.tokenizer.encode(" a").ids) == " a"


def test_what_has_no_piece_is_its_bytes(pieces) -> None:
    made = pieces({"\u2581": 0.0})
    assert made.cut("\u00e9") == ["\u2581", "<0xC3>", "<0xA9>"]
    assert made.tokenizer.decode(made.tokenizer.encode("\u00e9").ids) == "\u00e9"


def test_runs_of_spaces_are_tokens_as_they_are_written(pieces) -> None:
    """Gemma's: of user-defined tokens the longest is matched first, in the text itself."""
    types = {"  ": USER_DEFINED, "   ": USER_DEFINED}
    made = pieces(
        {"\u2581": 0.0, "x": 0.0, "  ": 0.0, "   ": 0.0}, types, **{"tokenizer.ggml.add_space_prefix": False}
    )
    assert made.cut("     x x") == ["   ", "  ", "x", "\u2581", "x"]
    assert made.tokenizer.decode(made.tokenizer.encode("     x x").ids) == "     x x"


def test_a_file_without_a_template_has_none(tmp_path: Path) -> None:
    bare = unpack(write_bare(tmp_path / "m.gguf"))
    assert not (bare.folder / "chat_template.jinja").exists()
    template = "{{ bos_token }}\u00e9\r\n"
    told = unpack(write_bare(tmp_path / "t.gguf", **{"tokenizer.chat_template": template}))
    assert (told.folder / "chat_template.jinja").read_bytes() == template.encode()


def test_every_pre_tokenizer_makes_a_tokenizer(byte_level) -> None:
    for pre in CUTS:
        assert byte_level(pre, ["a", SPACED]).cut("a a") == ["a", SPACED, "a"]
