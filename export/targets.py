"""What the graphs of each target may be made of: the one place that tells targets apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stillgraph.manifest import Precision, Target

# How a portable decode writes one token: as traced, or as `ship` rewrites it for a runtime.
CacheWrite = Literal["ScatterElements", "Where"]
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own ops


@dataclass(frozen=True)
class TargetTraits:
    """Ops and cache of a target's graphs.

    own_ops: whether ONNX Runtime's own ops stand for several of ONNX: attention with its cache and RoPE,
    products with weights of few bits, products of int8 with int8. opset: version of ONNX as traced;
    few_bits: domain and version of the ops that read weights of few bits; precisions: what these ops can
    store on a CPU; slack: cache slots over a window (`GraphShape.slack`) that a chunk of as many tokens
    needs, None where every layer has ctx slots; attention: the op, where it is one; head_multiple: what
    head sizes must be a multiple of;
    signed_scales: whether a block's scale may be below zero, which some runtimes refuse.
    """

    own_ops: bool
    opset: int
    few_bits: tuple[str, int]
    precisions: tuple[Precision, ...]
    slack: int | None
    attention: str | None
    head_multiple: int
    signed_scales: bool


TARGETS: dict[Target, TargetTraits] = {
    "portable": TargetTraits(
        own_ops=False,
        opset=20,
        few_bits=("", 21),  # DequantizeLinear of four bits, in blocks
        precisions=("fp32", "fp16", "int8", "int4"),
        slack=None,
        attention=None,
        head_multiple=1,
        signed_scales=False,
    ),
    "onnxruntime": TargetTraits(
        own_ops=True,
        opset=23,  # RMSNormalization
        few_bits=(MICROSOFT, 1),
        precisions=("fp32", "int8", "int4"),
        slack=128,
        attention="GroupQueryAttention",
        head_multiple=8,
        signed_scales=True,
    ),
}
