"""Every family of decoders against transformers: both targets, few bits, the growing graph, what is refused.

How a call is checked is in tests/export/conftest.py. P prompt tokens, C cache slots.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillgraph import load
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.config import check_positions
from stillgraph.exporter.validate.validate import validate
from stillgraph.manifest import read
from stillgraph.spec import GraphShape
from tests.decoders import DECODERS, FULL, SLIDING

Bundle = Callable[..., Path]
Refused = Callable[..., AbstractContextManager[None]]
FP32 = 1e-5  # sums in another order: some units of 2^-24 a layer, far below what a wrong mask or slot gives
P, CTX = 16, 40
TARGETS = ("portable", "onnxruntime")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", DECODERS)
def test_prompts_in_chunks_and_a_decode_to_the_last_slot(
    tiny_bundle: Bundle, replay_of: Any, family: str, target: str
) -> None:
    replay = replay_of(tiny_bundle(family=family, target=target), optimized=True)
    for prompt in (P, P + 1, 2 * P + 1, CTX, 1):
        replay.prefill(np.array([prompt]))
    while replay.lengths.max() < replay.ctx:
        replay.decode()
    assert all(replay.top1)


# One combination a family, in turn: what is quantized is the same for all.
FEW_BITS = list(zip(DECODERS, itertools.cycle(itertools.product(TARGETS, ("int4", "int8")))))


@pytest.mark.parametrize(("family", "form"), FEW_BITS, ids=[f"{f} {form}" for f, form in FEW_BITS])
def test_few_bits_are_proven_as_written(
    tiny_bundle: Bundle, tmp_path: Path, family: str, form: tuple[str, str]
) -> None:
    # Products of int8 activations round: the sharper an attention, the more of that comes out.
    bundle = tiny_bundle(family=family, target=form[0], precision=form[1], initializer_range=0.08)
    parity = validate(shutil.copytree(bundle, tmp_path / "own"), depth="quick", say=lambda line: None)
    assert parity.passed, parity.problem()


@pytest.mark.parametrize("family", DECODERS)
def test_the_growing_graph(tiny_bundle: Bundle, truth: Any, family: str) -> None:
    bundle = tiny_bundle([("dynamic", CTX, CTX)], family=family)
    expected = truth(read(bundle).source.id, 1, CTX)
    ids = expected.ids[0].tolist()
    graphs = load(bundle, threads=1).graphs
    logits = graphs.prefill([ids[:P]])
    for length in range(P, CTX):
        true = expected.logits[0, length - 1]
        assert np.abs(logits[0] - true).max() <= FP32 * np.abs(true).max(), length
        logits = graphs.decode([ids[length]])


SCALING: dict[str, Any] = DECODERS["ministral3"]["rope_parameters"]
FELT: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"use_sliding_window": False, "layer_types": None}),
    ("qwen3", {"layer_types": [FULL, FULL]}),
    ("mistral", {"sliding_window": None}),
    ("ministral", {"layer_types": None}),
    ("ministral", {"sliding_window": 6}),
    ("ministral3", {"sliding_window": None}),
    (
        "ministral3",
        {"rope_parameters": SCALING | {"llama_4_scaling_beta": 0}},
    ),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 24}),
    ("gemma2", {"layer_types": [FULL, FULL]}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    *(("granite", {name: 1.0}) for name in DECODERS["granite"] if name.endswith(("_multiplier", "_scaling"))),
    ("phi3", {"partial_rotary_factor": None}),
    ("phi3", {"sliding_window": None}),
    ("phi3, longrope", {"original_max_position_embeddings": 20}),
    ("phi3, longrope", {"max_position_embeddings": 64}),
]


@pytest.mark.parametrize(("family", "values"), FELT, ids=[f"{family} {values}" for family, values in FELT])
def test_what_a_family_has_of_its_own_is_felt(
    tiny_checkpoint: Bundle, truth: Any, family: str, values: dict[str, Any]
) -> None:
    """The tests above could pass with it ignored by transformers, or too weak to matter."""
    true = truth(str(tiny_checkpoint(family=family)), 1).logits
    other = truth(str(tiny_checkpoint(family=family, **values)), 1).logits
    assert np.abs(other - true).max() > 100 * FP32 * np.abs(true).max()


@pytest.mark.parametrize("target", TARGETS)
def test_layers_without_rope_that_have_a_window(tiny_bundle: Bundle, replay_of: Any, target: str) -> None:
    values = {"use_sliding_window": True, "sliding_window": 5}
    replay = replay_of(tiny_bundle(family="smollm3", target=target, **values), optimized=True)
    replay.prefill(np.array([2 * P + 1]))
    while replay.lengths.max() < replay.ctx:
        replay.decode()


WINDOWS: list[tuple[str, dict[str, Any], list[int | None]]] = [
    ("mistral", {}, [5, 5]),  # without layer_types it is in every layer
    ("phi3", {"sliding_window": None}, [None, None]),
    ("ministral3", {}, [9, 9]),
    ("phi3", {}, [5, 5]),
    ("ministral", {"layer_types": None}, [5, 5]),
    ("gemma2", {}, [5, None]),
    ("qwen3", {"layer_types": None, "max_window_layers": 1}, [None, 5]),
    ("qwen3", {"layer_types": None, "use_sliding_window": False}, [None, None]),
    ("qwen2", {"layer_types": None, "use_sliding_window": False}, [None, None]),
    ("smollm3", {"sliding_window": 5}, [None, None]),
    ("smollm3", {"sliding_window": 5, "use_sliding_window": True}, [None, 5]),
]


@pytest.mark.parametrize(("family", "values", "windows"), WINDOWS)
def test_windows_are_those_that_transformers_masks_by(
    tiny_checkpoint: Bundle, original: Any, family: str, values: dict[str, Any], windows: list[int | None]
) -> None:
    """Counted in the attention weights of its model."""
    checkpoint = str(tiny_checkpoint(family=family, **values))
    assert [layer.window for layer in open_checkpoint(checkpoint).spec.layers] == windows
    assert [seen(original(checkpoint), layer) for layer in range(2)] == windows


@torch.no_grad()
def seen(model: Any, index: int) -> int | None:
    """How many positions, itself included, the last of 12 attends to in a layer; None for all."""
    weights = model(torch.arange(6, 18)[None], output_attentions=True).attentions[index]
    count = int((weights[0, 0, -1] > 0).sum())
    return None if count == 12 else count


def test_longrope_ends_where_its_short_factor_does(tiny_checkpoint: Bundle, refused: Refused) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint(family="phi3, longrope")))
    shape = GraphShape(role="decode", max_len=1, ctx=CTX)
    check_positions(checkpoint.spec, shape)
    over = shape.model_copy(update={"ctx": CTX + 1})
    with refused("export", "--ctx 41", "original_max_position_embeddings", "'longrope'", "of 40"):
        check_positions(checkpoint.spec, over, checkpoint.family.limit(checkpoint.config))
    plain = open_checkpoint(str(tiny_checkpoint(family="phi3")))
    with refused("export", "--ctx 65", "the model's max_position_embeddings of 64"):
        over = shape.model_copy(update={"ctx": 65})
        check_positions(plain.spec, over, plain.family.limit(plain.config))


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (family, {"quantization_config": {"quant_method": "awq"}}, "quantization_config")
        for family in DECODERS
    ),
    *(
        (family, {"num_key_value_heads": 5}, "heads over 5 key/value heads")
        for family in DECODERS
        if family[:4] != "phi3"
    ),
    *((family, {"is_causal": False}, "is_causal false") for family in DECODERS),
    *((family, {"num_key_value_heads": 0}, "0 key/value heads") for family in ("qwen3", "llama")),
    ("qwen3", {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, "per_layer_config"),
    ("smollm3", {"rope_parameters": {"full_attention": YARN}}, "rope_parameters without a rope_type"),
    ("qwen3", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "RoPE type 'dynamic'"),
    ("qwen3", {"use_sliding_window": False}, "sliding_window None with sliding layers"),
    ("qwen3", {"num_experts": 8}, "num_experts 8 of a Qwen3ForCausalLM"),
    ("qwen3", {"layer_types": [FULL, "linear_attention"]}, "layer type 'linear_attention'"),
    ("mistral", {"layer_types": [FULL, SLIDING]}, "layer_types of a MistralForCausalLM"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0 with sliding layers"),
    ("mistral", {"num_local_experts": 8}, "num_local_experts 8"),
    ("ministral3", {"rope_parameters": YARN}, "rope_parameters without llama_4_scaling_beta"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("smollm3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("granite", {"sliding_window": 5}, "sliding_window 5 of a GraniteForCausalLM"),
    ("granite", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1"),
    ("olmo2", {"layer_types": [FULL, SLIDING]}, "layer_types of a Olmo2ForCausalLM"),
    ("olmo2", {"attention_sinks": 4}, "attention_sinks 4"),
]


@pytest.mark.parametrize(("family", "values", "reason"), REFUSED, ids=[f"{f} {r}" for f, _, r in REFUSED])
def test_what_the_graphs_would_get_wrong(
    tiny_checkpoint: Bundle,
    tmp_path: Path,
    refused: Refused,
    family: str,
    values: dict[str, Any],
    reason: str,
) -> None:
    own = Path(shutil.copytree(tiny_checkpoint(family=family), tmp_path / "own"))
    raw = json.loads((own / "config.json").read_text()) | values
    (own / "config.json").write_text(json.dumps(raw))
    with refused("read checkpoint", str(own), reason, "not supported"):
        open_checkpoint(str(own))
