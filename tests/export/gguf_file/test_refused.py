"""GGUF files that are refused: each by one sentence, before torch is imported."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from stillgraph.errors import StillgraphError
from stillgraph.exporter import checkpoint_folder
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import ExportConfig
from stillgraph.exporter.gguf_file.header import read_header
from stillgraph.exporter.gguf_file.unpack import check
from tests.gguf_writer import TABLE
from tests.gguf_writer import write_bare as write

STAGE = "read GGUF"


def test_the_one_that_the_others_differ_from_is_taken(tmp_path: Path) -> None:
    check(write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"split.count": 3}, ("one of 3 parts", "--merge")),
        ({"general.type": "mmproj"}, ("sees (mmproj)", "text model")),
        ({"general.type": "adapter"}, ("LoRA", "llama-export-lora")),
        ({"general.type": "imatrix"}, ("importance matrix",)),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ("layer_norm_rms_epsilon is missing",)),
        ({"llama.block_count": 0}, ("a size is 0",)),
        ({"llama.embedding_length": 1}, ("a size is 0",)),
        ({"llama.attention.head_count": 0}, ("a size is 0",)),
        ({"llama.block_count": 2**31 - 1}, ("layers of 1 tensors",)),
        ({"llama.block_count": "many"}, ("llama.block_count is 'many'",)),
        ({"llama.attention.head_count_kv": [2, 1]}, ("head_count_kv is [2, 1]",)),
        ({"llama.attention.value_length": 6}, ("value_length is 6", "only 4")),
        ({"llama.rope.dimension_count": 2, "llama.attention.key_length": 4}, ("count is 2", "only 4")),
        ({"llama.attention.causal": False}, ("attention.causal is False",)),
        ({"llama.expert_count": 8}, ("expert_count is 8",)),
        ({"llama.vocab_size": 5}, ("vocab_size is 5", "only 4")),
        ({"llama.rope.scaling.type": "yarn"}, ("rope.scaling.type 'yarn'",)),
        ({"llama.attention.sliding_window": 512}, ("llama.attention.sliding_window = 512",)),
        ({"tokenizer.ggml.model": "bert"}, ("tokenizer.ggml.model 'bert'",)),
        ({"tokenizer.ggml.pre": "default"}, ("tokenizer.ggml.pre 'default'",)),
        ({"tokenizer.ggml.pre": None}, ("tokenizer.ggml.pre None",)),
        ({"tokenizer.ggml.merges": None}, ("tokenizer.ggml.merges does not fit",)),
        ({"tokenizer.ggml.token_type": [3, 3]}, ("token_type does not fit its 4 tokens",)),
        ({"tokenizer.ggml.tokens": ["a", "a", "b", "c"]}, ("there twice",)),
        ({"tokenizer.ggml.tokens": list("abcdef"), "tokenizer.ggml.token_type": [1] * 6}, ("has 6 tokens",)),
        ({"tokenizer.ggml.eos_token_id": 4}, ("special token eos is 4", "has 4")),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, ("bos_token_id is",)),
        ({"tokenizer.ggml.model": "llama"}, ("tokenizer.ggml.scores does not fit",)),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, ("remove_extra_whitespaces",)),
    ],
)
def test_what_would_be_lost_or_is_not_there(tmp_path: Path, refused: Any, keys: Any, words: Any) -> None:
    path = write(tmp_path / "m.gguf", **keys)
    with refused(STAGE, str(path), *words):
        check(path)


@pytest.mark.parametrize("architecture", ["falcon", "gemma", "phi3", "clip"])
def test_other_architectures(tmp_path: Path, refused: Any, architecture: str) -> None:
    path = write(tmp_path / "m.gguf", architecture)
    with refused(STAGE, "mmproj" if architecture == "clip" else f"architecture {architecture!r}"):
        check(path)


def test_a_part_is_known_by_its_name(tmp_path: Path, refused: Any) -> None:
    path = write(tmp_path / "m-00002-of-00003.gguf")
    with refused(STAGE, "one of 3 parts"):
        check(path)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("blk.0.attn_q_extra.weight", None, ("tensor 'blk.0.attn_q_extra.weight'",)),
        ("blk.0.ffn_gate_exps.weight", None, ("ffn_gate_exps",)),
        ("rope_freqs.weight", None, ("rope_freqs.weight", "Llama 3")),
        ("output.weight", gguf.GGMLQuantizationType.Q8_K, ("Q8_K cannot be read",)),
    ],
)
def test_tensors_that_have_no_place(tmp_path: Path, refused: Any, name: str, kind: Any, words: Any) -> None:
    values = np.zeros((1, 292), np.uint8) if kind else np.full(2, 7, np.float32)
    path = write(tmp_path / "m.gguf", tensors=TABLE | {name: (values, kind)})
    with refused(STAGE, *words):
        check(path)


def header(version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HUGE = 2**60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty",)),
        (b"PK\3\4" + bytes(60), ("not a GGUF", "PK")),
        (header(1), ("version 1",)),
        (header(4), ("version 4",)),
        (header(0x03000000), ("big-endian",)),
        (b"GGUF\3\0\0\0", ("cut short",)),
        (header(keys=HUGE), (str(HUGE), "metadata key")),
        (header(tensors=HUGE), (str(HUGE), "tensor")),
        (header(keys=1, rest=string(b"a", HUGE)), ("cut short",)),
        (header(keys=1, rest=string(b"a") + struct.pack("<I", 13)), ("value of type 13",)),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 8, HUGE)), ("cut short",)),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 4, HUGE)), ("cut short",)),
        (header(keys=1, rest=string(b"a") + struct.pack("<IIQ", 9, 9, 1)), ("value of type 9",)),
        (header(keys=1, rest=string(b"\xff") + struct.pack("<IB", 7, 1)), ("no UTF-8",)),
        (header(keys=2, rest=(string(b"a") + struct.pack("<IB", 0, 1)) * 2), ("'a' twice",)),
        (header(tensors=1, rest=string(b"t") + struct.pack("<I", 5)), ("5 dimensions",)),
        (header(tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, HUGE, 0, 0)), ("'t' ends at byte",)),
        (header(tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 0, 0, HUGE)), ("'t' ends at byte",)),
        (header(tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 5, 2, 0)), ("Q4_0 in rows of 5",)),
        (header(tensors=1, rest=string(b"t") + struct.pack("<IQIQ", 1, 5, 999, 0)), ("unknown type 999",)),
        (
            header(keys=1, rest=string(b"general.alignment") + struct.pack("<II", 4, 0)),
            ("alignment of 0",),
        ),
    ],
)
def test_damaged_and_hostile_bytes(tmp_path: Path, refused: Any, content: bytes, words: Any) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with refused(STAGE, str(path), *words):
        check(path)


def test_one_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(whole), 9):
        path.write_bytes(whole[:length])
        with pytest.raises(StillgraphError):
            check(path)


def test_no_byte_brings_another_error(tmp_path: Path) -> None:
    whole, draw = write(tmp_path / "m.gguf").read_bytes(), random.Random(0)
    path, told = tmp_path / "bad.gguf", 0
    for _ in range(200):
        bad = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            bad[draw.randrange(len(bad))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(bad)
        try:
            check(path)
        except StillgraphError:
            told += 1
    assert told > 100


def test_it_is_told_before_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", **{"tokenizer.ggml.pre": "odd"})
    code = (
        "import sys\nfrom stillgraph import cli\n"
        f"code = cli.main(['export', 'bundle', '-m', {str(path)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "tokenizer.ggml.pre 'odd' is not supported" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("find", [open_checkpoint, checkpoint_folder.check_folder])
def test_no_such_file(refused: Any, find: Callable[[str], object]) -> None:
    with refused("read checkpoint", "models/nowhere.gguf: no such file"):
        find("models/nowhere.gguf")


def test_a_folder_with_one_says_to_name_it(tmp_path: Path, refused: Any) -> None:
    path = write(tmp_path / "m.gguf")
    with refused("read checkpoint", "has no config.json", f"name the file: {path}"):
        checkpoint_folder.check_folder(str(tmp_path))


def test_what_reads_it_is_not_installed(tmp_path: Path, refused: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint_folder, "find_spec", lambda name: None if name == "gguf" else name)
    with refused("read checkpoint", "takes gguf,", "stillgraph[export,gguf]"):
        open_checkpoint(str(write(tmp_path / "m.gguf")))


def test_the_bundle_is_named_without_the_ending() -> None:
    assert ExportConfig(model="models/tiny-q4_0.gguf").place == Path("artifacts/tiny-q4_0")


def test_a_header_says_where_the_weights_are(tmp_path: Path) -> None:
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    path = write(tmp_path / "m.gguf", tensors={"token_embd.weight": (values, None)})
    info = read_header(path).tensors["token_embd.weight"]
    assert (info.shape, info.kind, info.nbytes) == ((4, 8), "F32", 128)
    assert path.read_bytes()[info.start : info.start + info.nbytes] == values.tobytes()
