"""A GGUF as a checkpoint: small files in a folder of their own, as transformers has them, and its tensors."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillgraph.exporter.gguf_file.header import Header, read_header
from stillgraph.exporter.gguf_file.model_config import check_kind, config_of
from stillgraph.exporter.gguf_file.tensors import GgufTensor, find_names, find_tensors
from stillgraph.exporter.gguf_file.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Unpacked:
    """folder: config.json and the tokenizer's files, removed together with this object.

    tensors: the weights by transformers' names; they stay in the file at `path`.
    """

    path: Path
    folder: Path
    tensors: dict[str, GgufTensor]

    def place(self) -> dict[str, Any]:
        """What transformers' from_pretrained is given to read the file by itself."""
        return {"pretrained_model_name_or_path": self.path.parent, "gguf_file": self.path.name}


def check(path: Path) -> None:
    """Raises StillgraphError for a file that is no whole model, or has what would be lost, without torch."""
    header = read_header(path)
    _read(header)


def unpack(path: Path) -> Unpacked:
    """Raises StillgraphError as `check` does."""
    header = read_header(path)
    config, vocabulary = _read(header)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = find_tensors(header, check_kind(header), heads, kv_heads)
    folder = Path(tempfile.mkdtemp(prefix="stillgraph-gguf-"))
    made = Unpacked(path, folder, tensors)
    weakref.finalize(made, shutil.rmtree, folder, ignore_errors=True)
    ids = vocabulary.ids
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
    for name, content in {
        "config.json": config,
        "generation_config.json": generation | {"eos_token_id": vocabulary.stop},
        "tokenizer.json": vocabulary.tokenizer(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | vocabulary.names(),
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if vocabulary.template is not None:
        (folder / "chat_template.jinja").write_bytes(vocabulary.template.encode())
    return made


def _read(header: Header) -> tuple[dict[str, Any], Vocabulary]:
    find_names(header, check_kind(header))
    config = config_of(header)
    vocabulary = Vocabulary.of(header)
    if len(vocabulary.tokens) > config["vocab_size"]:
        problem = f"its vocabulary has {len(vocabulary.tokens)} tokens, and token_embd.weight as rows"
        header.refuse(f"{problem} {config['vocab_size']}", "convert the model again")
    return config, vocabulary
