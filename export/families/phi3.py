"""Phi 3, 3.5 and 4 mini: `Phi3ForCausalLM`. q, k, v are one weight, gate and up another."""

from __future__ import annotations

from typing import Any

from transformers import Phi3ForCausalLM
from transformers.models.phi3 import modeling_phi3 as phi3

from stillgraph.exporter.families import decoder_family, decoder_spec, windowed_layers
from stillgraph.patches.fixed_rotary import fixed_rotary
from stillgraph.patches.fused_attention import fused_attention
from stillgraph.patches.patch import Patch
from stillgraph.spec import ModelSpec

ORIGINAL = "original_max_position_embeddings"


def is_long(config: Any) -> bool:
    """Whether RoPE has other frequencies in a text of more than `ORIGINAL` positions."""
    return bool(config.rope_parameters["rope_type"] == "longrope")


def spec(config: Any) -> ModelSpec:
    """The shape of the decoder, whose positions end where those of longrope's short factor do."""
    whole = decoder_spec("Phi3ForCausalLM", config, windowed_layers)
    limit = config.rope_parameters[ORIGINAL] if is_long(config) else whole.max_position_embeddings
    return whole.model_copy(update={"max_position_embeddings": limit})


def limit(config: Any) -> str:
    """What a text must fit into, in words."""
    longrope = f"{ORIGINAL}, which RoPE type 'longrope' takes its short factor up to,"
    return longrope if is_long(config) else "max_position_embeddings"


def traced(config: Any) -> tuple[Patch, ...]:
    return (fixed_rotary(phi3.Phi3RotaryEmbedding),) if is_long(config) else ()


def ropes(config: Any) -> dict[str, Any]:
    """The RoPE parameters that are to be checked: any part of a head may be rotated."""
    return {"": config.rope_parameters | {"partial_rotary_factor": 1.0}}


FAMILY = decoder_family(
    Phi3ForCausalLM,
    norm=phi3.Phi3RMSNorm,
    attention=fused_attention(phi3.Phi3Attention),
    kinds=windowed_layers,
    ropes=ropes,
    rope_types=("default", "longrope"),
    traced=traced,
    spec=spec,
    limit=limit,
)
