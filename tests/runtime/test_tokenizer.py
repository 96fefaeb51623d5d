"""Ids equal to transformers', text in whole characters, stop strings across tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from stillgraph.errors import StillgraphError
from stillgraph.tokenizer import Stops, Stream, Text

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [*"abx<\n\u2581\u00e9\U0001f600", "ab", "\u2581a", "\u2581once", "\u2581\u2581"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>"]


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_fallback(strip: bool) -> Tokenizer:
    """Gemma's kind of decoder; with `strip` Llama's, which takes the space at the start of a text away."""
    vocab = {token: index for index, token in enumerate(SPECIAL + BYTES + WORDS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if strip else []))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {"bytes": byte_level(), "gemma": byte_fallback(False), "llama": byte_fallback(True)}


def save(folder: Path, tokenizer: Tokenizer, **config: object) -> Text:
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return Text(folder)


@pytest.fixture(scope="module", params=TOKENIZERS)
def text(request, tmp_path_factory) -> Text:
    return save(tmp_path_factory.mktemp(request.param), TOKENIZERS[request.param])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_pieces_join_to_the_decoded_whole(text: Text, data) -> None:
    ids = data.draw(st.lists(st.integers(0, text.tokenizer.get_vocab_size() - 1), max_size=40))
    stream = Stream(text)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text.decode(ids)


@settings(max_examples=100, deadline=None)
@given(written=st.text(alphabet="a\u00e9 \u20ac\U0001f600\U0001f468\u200d\U0001f469\n", max_size=20))
def test_characters_come_whole(text: Text, written: str) -> None:
    stream = Stream(text)
    pieces = [stream.push(token) for token in text.encode(written)]
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_its_character_is_whole(tmp_path: Path) -> None:
    text = save(tmp_path, byte_level())
    stream = Stream(text)
    assert [stream.push(token) for token in text.encode("a\u20acb")] == ["a", "", "", "\u20ac", "b"]


def test_long_texts_are_decoded_in_a_window(tmp_path: Path, monkeypatch) -> None:
    text = save(tmp_path, byte_level())
    stream, longest = Stream(text), 0
    decode = text.decode

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(text, "decode", watched)
    for token in text.encode("x" * 500):
        stream.push(token)
    assert longest < 10


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_eos_token": True},
        {"mask_token": "<mask>"},
        {"bos_token": {"__type": "AddedToken", "content": "<bos>", "special": True}, "add_bos_token": True},
    ],
)
@pytest.mark.parametrize("own_rule", [True, False])
def test_ids_equal_those_of_transformers(tmp_path: Path, config, own_rule) -> None:
    tokenizer = byte_level()
    if own_rule:
        begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        tokenizer.post_processor = begin
    ours, theirs = save(tmp_path, tokenizer, **config), AutoTokenizer.from_pretrained(tmp_path)
    for written in ("Once upon", " a <bos>b<start_of_turn>\n", "\u20ac \U0001f600", "a<mask>b"):
        assert ours.encode(written) == theirs(written)["input_ids"]
        assert ours.encode(written, special=False) == theirs(written, add_special_tokens=False)["input_ids"]
        ids = ours.encode(written)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    assert len(save(tmp_path, tokenizer).encode("abcdefgh")) == 8


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StillgraphError, match="load tokenizer"):
        Text(tmp_path)


def cut(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What goes out after each piece, and whether a stop string was met."""
    found, out, stopper = False, [], Stops(stops)
    for piece in pieces:
        text, found = stopper.push(piece)
        out.append(text)
        if found:
            return out, True
    return [*out, stopper.flush()], False


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello", " world"], [" wor"], (["Hello", ""], True)),
        (["a", "b", "c", "d"], ["bc"], (["a", "", ""], True)),
        (["ab", "x"], ["bc"], (["a", "bx", ""], False)),
        (["aab", "ab", "c"], ["abc"], (["a", "ab", ""], True)),
        (["end", "!"], ["!?"], (["end", "", "!"], False)),
        (["xyz"], ["z", "xy"], ([""], True)),
        (["a", "b"], [], (["a", "b", ""], False)),
    ],
)
def test_stop_strings(pieces, stops, expected) -> None:
    assert cut(pieces, stops) == expected


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=8),
    stop=st.text(alphabet="ab", min_size=1, max_size=4),
)
def test_a_stop_string_cuts_the_joined_text(pieces, stop) -> None:
    out, found = cut(pieces, [stop])
    whole = "".join(pieces)
    assert "".join(out) == whole.partition(stop)[0]
    assert found == (stop in whole)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(StillgraphError, match="empty"):
        Stops([""])
