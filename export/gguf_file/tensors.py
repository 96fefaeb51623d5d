"""The weights of a GGUF by transformers' names, dequantized when they are read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from stillgraph.exporter.gguf_file.header import Header, TensorInfo

if TYPE_CHECKING:
    import torch

FREQUENCIES = "rope_freqs.weight"  # no weight of the model: the config says the same
PLACES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OF_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies, and what llama.cpp has done to it. heads: whose rows it has reordered, if any."""

    path: Path
    info: TensorInfo
    heads: int | None = None
    shifted: bool = False

    @property
    def name(self) -> str:
        return self.info.name

    def read(self) -> torch.Tensor:
        """The tensor in fp32, as it was before it was converted, of what is left of it."""
        import torch

        found = _values(self.path, self.info)
        if self.shifted:  # llama.cpp multiplies by the weight of a norm, and Gemma by 1 + weight
            found = found - np.float32(1)
        if self.heads:  # llama.cpp rotates neighbors, transformers halves of a head
            parts = found.reshape(self.heads, -1, 2, *found.shape[1:])
            found = parts.swapaxes(1, 2).reshape(found.shape)
        return torch.from_numpy(np.array(found))

    def shape(self) -> tuple[int, ...]:
        return self.info.shape


def values(header: Header, name: str) -> np.ndarray:
    """A tensor in fp32, as the file has it."""
    return _values(header.path, header.tensors[name])


def _values(path: Path, info: TensorInfo) -> np.ndarray:
    kind = GGMLQuantizationType[info.kind]
    block, nbytes = GGML_QUANT_SIZES[kind]
    shape = (*info.shape[:-1], info.shape[-1] // block * nbytes)
    stored = np.memmap(path, np.uint8, "r", info.start, shape)
    found: np.ndarray = dequantize(stored, kind)
    return found.reshape(info.shape)


def find_names(header: Header, architecture: str) -> dict[str, str]:
    """transformers' name of each weight to the file's. Raises StillgraphError for one that has none."""
    modules = MODULES | (OF_GEMMA if architecture.startswith("gemma") else {})
    found = {}
    for name in header.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if name in PLACES:
            found[PLACES[name]] = name
        elif block and block[2] in modules:
            found[f"model.layers.{int(block[1])}.{modules[block[2]]}.{block[3]}"] = name
        elif name != FREQUENCIES:
            header.refuse(f"tensor {name!r:.80} is not supported", "export the original checkpoint")
    _check_kinds(header)
    return found


def _check_kinds(header: Header) -> None:
    for info in {info.kind: info for info in header.tensors.values()}.values():
        kind = GGMLQuantizationType[info.kind]
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            remedy = "name a GGUF of another quantization"
            header.refuse(f"tensor {info.name!r:.80} of {info.kind} cannot be read", remedy)


def find_tensors(header: Header, architecture: str, heads: int, kv_heads: int) -> dict[str, GgufTensor]:
    """Every weight by transformers' name. Raises StillgraphError for one that has none."""
    reordered = {"attn_q": heads, "attn_k": kv_heads} if architecture == "llama" else {}
    found = {}
    for place, name in find_names(header, architecture).items():
        module = name.split(".")[-2]
        shifted = architecture.startswith("gemma") and name.endswith("norm.weight")
        found[place] = GgufTensor(header.path, header.tensors[name], reordered.get(module), shifted)
    return found
