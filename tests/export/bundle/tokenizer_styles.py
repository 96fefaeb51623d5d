"""Tokenizers in the styles that checkpoints have, published as files and shipped in a bundle's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer

from stillgraph.exporter.bundle.tokenizer_files import write_tokenizer
from stillgraph.tokenizer import Text

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LEARNED = [
    "the little boy had a kite",
    "the little girl had 12 kites and 345 boats",
    "a boy, a girl: 1200 boats!",
]
NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"} | NAMES
WRITTEN = (
    "the little boy", " the  <bos>kite <eos> ", "a <new> b",
    "a<new>b <more>\n<more>", "x <eos>  y<one> z<two>",
    "12 345 1200", "\u00e9\u20ac \U0001f600\n\n", "<fake> <mask> c",
)  # fmt: skip


def byte_level(*rules: Any) -> Tokenizer:
    """rules: pre-tokenizers before the bytes' own."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rules, last]) if rules else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return learned(
        tokenizer,
        BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return learned(tokenizer, WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return learned(tokenizer, trainer)


def learned(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(LEARNED, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def publish(folder: Path, tokenizer: Tokenizer | None, **files: Any) -> Path:
    """A checkpoint's tokenizer; files: by their name without .json."""
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"config": {"model_type": "llama"}, "tokenizer_config": PLAIN} | files).items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ship(source: Path, sees: bool = False) -> Path:
    bundle = source.with_name("bundle")
    bundle.mkdir()
    write_tokenizer(source, bundle, sees, lambda line: None)
    return bundle


def assert_encodes_as(text: Text, theirs: Any) -> None:
    for written in WRITTEN:
        assert text.encode(written) == theirs(written)["input_ids"], written
        ids = theirs(written, add_special_tokens=False)["input_ids"]
        assert text.encode(written, special=False) == ids, written
        assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True), written
    assert text.special_tokens == theirs.special_tokens_map


def put(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
