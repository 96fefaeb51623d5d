"""A graph of growing lengths under the engine: what is fed, kept, cut off and ended. No export, no torch.

The graph is the mock model of mock_model.py as ONNX with symbolic lengths: keys are the ids, and the next
token is sum((slot + 1) * id) mod V, so that a wrong slot, order or length gives a wrong token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from stillgraph import load
from stillgraph.calling import Calling, Tokens
from stillgraph.dynamic import GrowingGraph, common
from stillgraph.engine import Engine, Step
from stillgraph.errors import StillgraphError
from stillgraph.manifest import Alias, CheckpointSource, File, GraphEntry, Manifest, Weights
from stillgraph.ports import NEW, PAST, TOTAL, Port, input_ports, output_ports, past_names, present_names
from stillgraph.session import Session
from stillgraph.spec import GraphShape, LayerSpec, ModelSpec
from tests.interrupts import interruptions

V, C = 11, 16
SHAPE = GraphShape(role="dynamic", max_len=C, ctx=C)
SPEC = ModelSpec(
    architecture="MockForCausalLM",
    vocab_size=V,
    hidden_size=1,
    num_attention_heads=1,
    max_position_embeddings=C,
    layers=(LayerSpec(kind="full_attention", kv_heads=1, head_dim=1),),
)
Fed = list[tuple[int, list[int]]]  # of each call: past tokens, new ids


def onnx_growing() -> bytes:
    constants = {
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "column": np.array([1, 1, -1, 1], np.int64),
        "flat": np.array([-1], np.int64),
        "cell": np.array([1, 1, 1], np.int64),
        "two": np.array(2, np.float32),
        "v": np.array(V, np.float32),
        "vocab": np.arange(V, dtype=np.float32)[None, None],
    }
    steps = [
        ("Cast", ["input_ids"], "ids", {"to": TensorProto.FLOAT}),
        ("Reshape", ["ids", "column"], "key", {}),
        ("Mul", ["key", "two"], "value", {}),
        ("Concat", ["past_key_values.0.key", "key"], "present.0.key", {"axis": 2}),
        ("Concat", ["past_key_values.0.value", "value"], "present.0.value", {"axis": 2}),
        ("Sub", ["present.0.value", "present.0.key"], "difference", {}),
        ("Reshape", ["difference", "flat"], "held", {}),
        ("Size", ["held"], "count", {}),
        ("Add", ["count", "one"], "end", {}),
        ("Range", ["one", "end", "one"], "positions", {}),
        ("Cast", ["positions"], "weight", {"to": TensorProto.FLOAT}),
        ("Mul", ["held", "weight"], "weighted", {}),
        ("ReduceSum", ["weighted"], "sum", {}),
        ("Mod", ["sum", "v"], "next", {"fmod": 1}),
        ("Reshape", ["next", "cell"], "target", {}),
        ("Sub", ["vocab", "target"], "distance", {}),
        ("Abs", ["distance"], "absolute", {}),
        ("Neg", ["absolute"], "logits", {}),
    ]
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}

    def infos(ports: tuple[Port, ...]) -> list:
        return [helper.make_tensor_value_info(port.name, kinds[port.dtype], port.shape) for port in ports]

    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in steps],
        "growing",
        infos(input_ports(SPEC, SHAPE)),
        infos(output_ports(SPEC, SHAPE)),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    data = onnx_growing()
    (tmp_path / "dynamic.onnx").write_bytes(data)
    (tmp_path / "weights.data").write_bytes(b"\0" * 4)
    entry = GraphEntry(
        shape=SHAPE,
        file=File(path="dynamic.onnx", nbytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
        inputs=input_ports(SPEC, SHAPE),
        outputs=output_ports(SPEC, SHAPE),
        aliases=tuple(
            Alias(output=output, input=past, same_buffer=False)
            for output, past in zip(present_names(0), past_names(0), strict=True)
        ),
    )
    manifest = Manifest(
        source=CheckpointSource(id="mock", model_type="mock", checkpoint_sha256="0" * 64),
        model=SPEC,
        target="portable",
        precision="fp32",
        tools={},
        graphs={"dynamic": entry},
        weights=Weights(file=File(path="weights.data", nbytes=4, sha256="0" * 64), tensors={}),
        calling=Calling(tokens=Tokens(bos=None, stop=()), prompt=None),
        files=(),
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Fed:
    """What every call of a session was fed, as it comes."""
    calls: Fed = []
    original = Session.call

    def call(self: Session, feeds: dict[str, ort.OrtValue]) -> list[ort.OrtValue]:
        calls.append((feeds[past_names(0)[0]].shape()[2], feeds["input_ids"].numpy()[0].tolist()))
        return original(self, feeds)

    monkeypatch.setattr(Session, "call", call)
    return calls


def greedy(ids: list[int], count: int) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(sum((slot + 1) * token for slot, token in enumerate(text)) % V)
    return text[len(ids) :]


def tokens(steps: Iterator[Step]) -> list[int]:
    return [step.token for step in steps]


@pytest.mark.parametrize("length", [1, 2, 7, C])
def test_a_prompt_goes_in_at_once_and_each_token_behind_it(bundle: Path, fed: Fed, length: int) -> None:
    prompt = [(3 * slot + 1) % V for slot in range(length)]
    found = tokens(load(bundle).stream(prompt, max_new_tokens=4))
    assert found == greedy(prompt, len(found))
    assert fed[0] == (0, prompt)
    assert fed[1:] == [(length + i, [token]) for i, token in enumerate(found[:-1])]


@pytest.mark.parametrize("length", [1, 5, C - 1, C])
def test_the_context_ends_after_its_last_token(bundle: Path, length: int) -> None:
    prompt = [slot % V for slot in range(length)]
    steps = list(load(bundle).stream(prompt, max_new_tokens=100))
    assert [step.token for step in steps] == greedy(prompt, C - length + 1)
    assert [step.finish_reason for step in steps] == [None] * (C - length) + ["context"]


def test_a_chat_computes_only_what_is_new(bundle: Path, fed: Fed) -> None:
    engine = load(bundle)
    first = [4, 2, 9]
    answer = tokens(engine.stream(first, max_new_tokens=3))
    held = first + answer[:2]  # the last token was never fed
    assert engine.graphs.cached == [held]
    fed.clear()
    second = [*held, 5, 6]
    assert tokens(engine.stream(second, max_new_tokens=2)) == greedy(second, 2)
    assert fed[0] == (5, [5, 6])


def test_a_prefix_that_parts_is_cut_there(bundle: Path, fed: Fed) -> None:
    engine = load(bundle)
    list(engine.stream([1, 2, 3, 4, 5, 6], max_new_tokens=2))
    fed.clear()
    assert tokens(engine.stream([1, 2, 9], max_new_tokens=4)) == greedy([1, 2, 9], 4)
    assert fed[0] == (2, [9])
    fed.clear()
    assert tokens(engine.stream([1, 2, 9], max_new_tokens=4)) == greedy([1, 2, 9], 4)
    assert fed[0] == (2, [9])  # the same prompt again: its last token gives the logits


@pytest.mark.parametrize(
    "forget", [Engine.reset, lambda engine: tokens(engine.stream([7], max_new_tokens=1))]
)
def test_nothing_is_kept_where_nothing_is_shared(
    bundle: Path, fed: Fed, forget: Callable[[Engine], object]
) -> None:
    engine = load(bundle)
    list(engine.stream([1, 2, 3], max_new_tokens=2))
    forget(engine)
    fed.clear()
    assert tokens(engine.stream([1, 2, 3], max_new_tokens=3)) == greedy([1, 2, 3], 3)
    assert fed[0] == (0, [1, 2, 3])


def test_presents_become_pasts_without_a_copy(bundle: Path) -> None:
    graphs = load(bundle).graphs
    assert isinstance(graphs, GrowingGraph)
    made: list[ort.OrtValue] = []
    call = graphs._graph.call
    graphs._graph.call = lambda feeds: made.extend(call(feeds)) or made[-3:]  # type: ignore[method-assign]
    graphs.prefill([[1, 2, 3]])
    assert [id(value) for value in graphs._held.past.values()] == [id(value) for value in made[1:]]


def test_a_prefill_that_is_to_be_unloaded_changes_nothing(bundle: Path) -> None:
    engine = load(bundle, unload_prefill=True)
    loading = engine.load_seconds
    assert loading > 0
    assert tokens(engine.stream([1, 2, 3], max_new_tokens=3)) == greedy([1, 2, 3], 3)
    assert engine.load_seconds == loading


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[]], "the prompt is empty"),
        ([[V]], f"token id {V} is outside the vocabulary"),
        ([[1] * (C + 1)], f"the prompt has {C + 1} tokens and the cache takes {C}"),
        ([[1], [2]], "2 prompts for graphs of 1 rows"),
    ],
)
def test_bad_prompts_are_refused(bundle: Path, prompts: list[list[int]], said: str) -> None:
    with pytest.raises(StillgraphError, match=said):
        load(bundle).stream_batch(prompts)


@pytest.mark.parametrize(
    ("cached", "prompt", "count"),
    [([], [1], 0), ([1], [1], 0), ([1, 2], [1, 2], 1), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1)],
)
def test_common(cached: list[int], prompt: list[int], count: int) -> None:
    assert common(cached, prompt) == count


def test_ports_have_the_names_of_static_ones_and_lengths_for_slots() -> None:
    static = GraphShape(role="decode", max_len=1, ctx=C)
    names = {port.name for port in input_ports(SPEC, static)} - {"past_length"}
    assert {port.name for port in input_ports(SPEC, SHAPE)} == names
    assert [p.name for p in output_ports(SPEC, SHAPE)] == [p.name for p in output_ports(SPEC, static)]
    shapes = {port.name: port.shape for port in (*input_ports(SPEC, SHAPE), *output_ports(SPEC, SHAPE))}
    assert shapes["input_ids"] == (1, NEW)
    assert shapes["past_key_values.0.key"] == (1, 1, PAST, 1)
    assert shapes["present.0.value"] == (1, 1, TOTAL, 1)
    assert shapes["logits"] == (1, 1, V)
    past = input_ports(SPEC, SHAPE)[1]
    assert past.at({PAST: 3}) == (1, 1, 3, 1)
    with pytest.raises(KeyError, match=PAST):
        _ = past.nbytes


@pytest.mark.parametrize("change", [{"batch": 2}, {"max_len": 8}, {"ctx": None}, {"slack": C}])
def test_dynamic_shapes_that_cannot_be(change: dict[str, int | None]) -> None:
    with pytest.raises(ValidationError):
        GraphShape(**({"role": "dynamic", "max_len": C, "ctx": C} | change))


def test_lengths_are_for_dynamic_graphs_alone(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace(f'"{PAST}"', "16"))
    with pytest.raises(StillgraphError, match="do not fit the model"):
        load(bundle)


def test_a_request_that_was_cut_off_poisons_none(bundle: Path) -> None:
    engine, prompt = load(bundle), [4, 2, 9, 1]
    known = [4, 2, 7]  # of which the cache keeps a part
    for where in interruptions(
        lambda: [*engine.stream(known, max_new_tokens=1), *engine.stream(prompt, max_new_tokens=3)]
    ):
        assert tokens(engine.stream(prompt, max_new_tokens=3)) == greedy(prompt, 3), where
