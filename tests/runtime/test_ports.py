"""What a graph is called with: layers of other heads, layers without a cache, and what each port is for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from stillgraph.ports import NEW, PAST, TOTAL, Port, input_ports, of_role, output_ports
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec, VisionSpec, cache_shape

SMALL: dict[str, Any] = {"kind": "sliding_attention", "window": 5, "kv_heads": 2, "head_dim": 8}
LARGE: dict[str, Any] = {"kind": "full_attention", "kv_heads": 1, "head_dim": 16}
PICTURES = VisionSpec(
    channels=3, height=4, width=6, image_tokens=7, image_token=9, mark="<image>", bidirectional=True
)


def spec_of(*layers: dict[str, Any], vision: VisionSpec | None = None) -> ModelSpec:
    made = tuple(LayerSpec(**layer) for layer in layers)
    return ModelSpec(
        architecture="Mixed", vocab_size=11, hidden_size=12, num_attention_heads=4,
        max_position_embeddings=64, layers=made, vision=vision,
    )  # fmt: skip


MIXED = spec_of(SMALL, LARGE, SMALL | {"kv_from": 0}, LARGE, LARGE | {"kv_from": 1})
STATIC = GraphShape(role="prefill", batch=3, max_len=4, ctx=32)
FUSED = GraphShape(role="decode", batch=3, max_len=1, ctx=32, slack=6)
GROWING = GraphShape(role="dynamic", max_len=32, ctx=32)


@pytest.mark.parametrize(
    ("shape", "small", "large"),
    [
        (STATIC, (3, 2, 32, 8), (3, 1, 32, 16)),
        (FUSED, (3, 2, 11, 8), (3, 1, 38, 16)),
        (GROWING, (1, 2, PAST, 8), (1, 1, PAST, 16)),
    ],
)
def test_each_layer_has_its_own_heads_and_one_that_shares_has_no_port(shape, small, large) -> None:
    pasts = [port for port in input_ports(MIXED, shape) if port.is_cache]
    presents = [port for port in output_ports(MIXED, shape) if port.is_cache]
    expected = [(0, small), (0, small), (1, large), (1, large), (3, large), (3, large)]
    assert [(port.layer, port.shape) for port in pasts] == expected
    assert [port.role for port in pasts] == ["key", "value"] * 3
    assert [(port.role, port.layer) for port in presents] == [(port.role, port.layer) for port in pasts]
    lengths = {PAST: TOTAL}
    assert [port.shape for port in presents] == [
        tuple(lengths.get(size, size) for size in port.shape) for port in pasts
    ]
    assert pasts[4].name == "past_key_values.3.key"
    assert presents[5].name == "present.3.value"


def test_bytes_of_a_cache_are_those_of_each_layer() -> None:
    pasts = [port for port in input_ports(MIXED, FUSED) if port.is_cache]
    small, large = 3 * 2 * 11 * 8 * 4, 3 * 1 * 38 * 16 * 4
    assert [port.nbytes for port in pasts] == [small, small, large, large, large, large]
    assert cache_shape(MIXED, FUSED, 1) == (3, 1, 38, 16)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([SMALL, SMALL | {"kv_from": 1}], "layer 1 reads keys and values of layer 1, not before it"),
        ([SMALL | {"kv_from": 1}, SMALL], "layer 0 reads keys and values of layer 1, not before it"),
        ([SMALL, LARGE | {"kv_from": 0}], "of another kind or size"),
        ([SMALL, SMALL | {"head_dim": 16, "kv_from": 0}], "of another kind or size"),
        ([SMALL, SMALL | {"kv_heads": 1, "kv_from": 0}], "of another kind or size"),
        ([SMALL, SMALL | {"window": 6, "kv_from": 0}], "of another kind or size"),
        ([SMALL, SMALL | {"kv_from": 0}, SMALL | {"kv_from": 1}], "layer 1, which has none of its own"),
        ([SMALL | {"kv_heads": 0}], "greater than 0"),
    ],
)
def test_layers_that_cannot_be(layers: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        spec_of(*layers)


def roles(ports: tuple[Port, ...]) -> list[str]:
    return [port.role for port in ports if not port.is_cache]


def test_every_port_has_a_role() -> None:
    seeing = spec_of(SMALL, vision=PICTURES)
    embeds = STATIC.model_copy(update={"embeds": True})
    vision = GraphShape(role="vision", max_len=7)
    embed = GraphShape(role="embed", batch=3, max_len=4)
    decode = GraphShape(role="decode", max_len=1, ctx=32)
    first = GraphShape(role="prefill", max_len=4)
    assert roles(input_ports(seeing, STATIC)) == ["token_ids", "valid_length", "past_length"]
    assert roles(input_ports(seeing, first)) == ["token_ids", "valid_length"]
    assert roles(input_ports(seeing, decode)) == ["token_ids", "past_length"]
    assert roles(input_ports(seeing, GROWING)) == ["token_ids"]
    assert roles(input_ports(seeing, embeds)) == [
        "embeddings",
        "valid_length",
        "picture_numbers",
        "past_length",
    ]
    assert (roles(input_ports(seeing, embed)), roles(output_ports(seeing, embed))) == (
        ["token_ids"],
        ["embeddings"],
    )
    assert (roles(input_ports(seeing, vision)), roles(output_ports(seeing, vision))) == (
        ["pixels"],
        ["image_features"],
    )
    for shape in (STATIC, decode, GROWING, embeds):
        assert roles(output_ports(seeing, shape)) == ["logits"]
    assert of_role(input_ports(seeing, GROWING), "token_ids").shape == (1, NEW)
    with pytest.raises(KeyError):
        of_role(input_ports(seeing, GROWING), "past_length")


@pytest.mark.parametrize(("role", "layer"), [("key", None), ("logits", 0)])
def test_a_layer_is_of_keys_and_values_alone(role: Any, layer: int | None) -> None:
    with pytest.raises(ValidationError, match="a port of role"):
        Port(name="any", role=role, layer=layer, dtype="float32", shape=(1,), meaning="any")
