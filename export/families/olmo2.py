"""OLMo 2: `Olmo2ForCausalLM`. Queries and keys have norms over all heads."""

from __future__ import annotations

from transformers import Olmo2ForCausalLM
from transformers.models.olmo2 import modeling_olmo2 as olmo2

from stillgraph.exporter.families import decoder_family, full_layers
from stillgraph.patches.fused_attention import fused_attention

FAMILY = decoder_family(
    Olmo2ForCausalLM,
    norm=olmo2.Olmo2RMSNorm,
    attention=fused_attention(olmo2.Olmo2Attention),
    mlp=olmo2.Olmo2MLP,
    kinds=full_layers,
)
