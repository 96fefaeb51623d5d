"""llama.cpp through the C interface of llama-cpp-python, as one contender; and the GGUF files it takes.

python llamacpp.py prepare CHECKPOINT MODELS COMMAND ...    # llama-source.gguf, and one of each of QUANTIZED

COMMAND, with CHECKPOINT and a new FILE.npz behind it, writes what the names that end in `-im` take.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

PERIOD = 6  # llama.cpp fixes which layers of a Gemma 3 are full: every sixth
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OF_LLAMA = {
    "post_attention_layernorm": "ffn_norm"
}  # before the feed-forward there, behind attention in Gemma 3
TABLES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
Q4_0 = 2  # GGML_TYPE_Q4_0
KINDS = {"gemma3_text": "gemma3", "llama": "llama"}  # as GGUF calls models, by transformers' names
QUANTIZED = {  # by name: the type, and that of the embedding and head where it is not llama.cpp's default
    "q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, None),
    "q4_0-embd4": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, Q4_0),
    "q4_k_m": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, None),
    "q4_k_m-im": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, None),
    "iq4_nl": (llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, None),
    "iq4_nl-im": (llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, None),
    "q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, None),
}


class Llama:
    """The low-level interface: no Python but one call and an argmax a step."""

    def __init__(self, request: Any) -> None:
        silence()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(request.model.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = request.ctx, 512, 512
        params.n_threads = params.n_threads_batch = request.threads
        params.swa_full = False  # sliding layers keep their window alone: less memory, no slower
        # flash attention is left to llama.cpp (auto); LLAMA_FLASH=0 or 1 decides, to see which is faster
        params.flash_attn_type = int(os.environ.get("LLAMA_FLASH", params.flash_attn_type))
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot open {request.model}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.swap_seconds = 0.0
        self.facts = {
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "weights_mb": Path(request.model).stat().st_size / 1e6,
            "read_mb": llama_cpp.llama_model_size(model) / 1e6,  # of tied tensors; the file has a tokenizer
        }

    def generate(self, ids: list[int], count: int) -> Iterator[int]:
        self._clear()
        fed = ids
        for _ in range(count):
            token = int(self._decode(fed).argmax())
            yield token
            fed = [token]

    def logits(self, ids: list[int], first: int) -> Iterator[Any]:
        self._clear()
        yield self._decode(ids[: first + 1])
        for token in ids[first + 1 :]:
            yield self._decode([token])

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def _decode(self, ids: list[int]) -> np.ndarray:
        """Feed ids after those in the cache, 512 at a time: logits [V], which the next call overwrites."""
        for start in range(0, len(ids), 512):
            chunk = ids[start : start + 512]
            array = (llama_cpp.llama_token * len(chunk))(*chunk)
            # a batch made by get_one asks for the logits of its last token alone
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(chunk))):
                raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        found: np.ndarray = np.ctypeslib.as_array(logits, shape=(self.vocab,))
        return found


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level >= 4 or os.environ.get("LLAMA_LOG"):  # errors
        sys.stderr.buffer.write(text)


def silence() -> None:
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


def tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of each tensor of a folder's safetensors, mapped; bfloat16 as its bits, uint16."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise SystemExit(f"{name} is {entry['dtype']}, this script takes {', '.join(DTYPES)} alone")
            start, end = (8 + size + at for at in entry["data_offsets"])
            yield name, data[start:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write_gguf(checkpoint: Path, target: Path) -> None:
    """A Gemma 3 or Llama checkpoint as GGUF, in its own dtype, without a vocabulary: it is fed with ids."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    kind = KINDS.get(config["model_type"])
    if kind is None:
        raise SystemExit(f"this script writes no GGUF of a {config['model_type']}")
    writer = gguf.GGUFWriter(target, kind)
    _add_config(writer, config)
    for name, values in tensors(checkpoint):
        stem, gemma = gguf_name(name, kind), kind == "gemma3"
        rows = values if gemma else _paired(name, values, config)
        if name.endswith("norm.weight"):  # llama.cpp multiplies by the weight, Gemma 3 by 1 + weight
            writer.add_tensor(stem, np.ascontiguousarray(_widened(values) + gemma))
        elif values.dtype == np.uint16:
            writer.add_tensor(stem, rows.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(stem, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _widened(values: np.ndarray) -> np.ndarray:
    """As float32."""
    if values.dtype != np.uint16:
        return values.astype(np.float32)
    wide: np.ndarray = (values.astype(np.uint32) << 16).view(np.float32)
    return wide


def _paired(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows in the order of a Llama's GGUF, whose RoPE turns neighbors where transformers turns halves."""
    heads = {
        "q_proj.weight": config["num_attention_heads"],
        "k_proj.weight": config["num_key_value_heads"],
    }
    count = heads.get(".".join(name.split(".")[-2:]))
    if count is None:
        return values
    split = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _add_config(writer: Any, config: dict[str, Any]) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    (_add_gemma if config["model_type"] == "gemma3_text" else _add_llama)(writer, config, head)


def _add_gemma(writer: Any, config: dict[str, Any], head: int) -> None:
    kinds = ["full" if (i + 1) % PERIOD == 0 else "sliding" for i in range(config["num_hidden_layers"])]
    if [kind.split("_")[0] for kind in config["layer_types"]] != kinds or config[
        "query_pre_attn_scalar"
    ] != head:
        raise SystemExit("llama.cpp takes full layers at every sixth place and a scale of head_dim alone")
    rope = config["rope_parameters"]
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])


def _add_llama(writer: Any, config: dict[str, Any], head: int) -> None:
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default" or config.get("attention_bias"):
        raise SystemExit("this script takes a Llama with plain RoPE and without biases")
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])


def gguf_name(name: str, kind: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight; kind: of model, as GGUF calls it."""
    if name in TABLES:
        return TABLES[name]
    names = NAMES | (OF_LLAMA if kind == "llama" else {})
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"


def importance_matrix(checkpoint: Path, file: Path, command: list[str]) -> Any:
    """llama.cpp's array of importances by tensor, ended by one without a name; file: where they are kept."""
    if not file.is_file():
        subprocess.run([*command, str(checkpoint), str(file)], check=True)
    kind = KINDS[json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]]
    entry, found = llama_cpp.llama_model_imatrix_data, []
    with np.load(file) as stored:
        for name, values in stored.items():
            numbers = (ctypes.c_float * len(values))(*values.tolist())
            found.append(entry(gguf_name(name, kind).encode(), numbers, len(values)))
    return (entry * (len(found) + 1))(*found, entry(None, None, 0))


def prepare(checkpoint: Path, models: Path, command: list[str]) -> None:
    """Write the GGUF and quantize it: q4_0 keeps the embedding at 8 bits, which is llama.cpp's default."""
    silence()
    source = models / "llama-source.gguf"
    write_gguf(checkpoint, source)
    for name, (kind, embedding) in QUANTIZED.items():
        if name.endswith("-im") and not command:
            continue
        params = llama_cpp.llama_model_quantize_default_params()
        if name.endswith("-im"):
            params.imatrix = importance_matrix(checkpoint, models / "importance.npz", command)
        params.ftype = kind
        if embedding is not None:  # the tied head is the same tensor
            params.token_embedding_type = params.output_tensor_type = embedding
        target = models / f"llama-{name}.gguf"
        beside = target.with_suffix(".part")  # a file that exists is complete
        if llama_cpp.llama_model_quantize(bytes(source), bytes(beside), ctypes.byref(params)):
            raise SystemExit(f"llama.cpp cannot write {target}")
        beside.replace(target)


def open_contender(request: Any) -> Llama:
    return Llama(request)


if __name__ == "__main__":
    prepare(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
