"""The graph of growing lengths: greedy-equal to PyTorch past the window, in a bundle like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM
from typer.testing import CliRunner

from stillgraph import load
from stillgraph.engine import Engine
from stillgraph.exporter import cli
from stillgraph.exporter.bundle.build import export
from stillgraph.exporter.bundle.inspection import inspect
from stillgraph.exporter.bundle.inspection_tables import tables
from stillgraph.exporter.bundle.resimplify import resimplify
from stillgraph.exporter.compile.compile import compile_bundle
from stillgraph.exporter.config import ExportConfig, dynamic_shape, request
from stillgraph.exporter.ir.simplify import FORBIDDEN, static_problem
from stillgraph.exporter.trace.graphs import masks
from stillgraph.exporter.validate.validate import validate
from stillgraph.files import check_files
from stillgraph.manifest import read
from stillgraph.ports import NEW, PAST, TOTAL, past_names, present_names
from stillgraph.spec import GraphShape

Refused = Callable[..., AbstractContextManager[None]]
CTX = 256
STEPS = 60
DECODE = [("decode", 1, 40)]
FP32 = 1e-5  # sums in another order; a wrong mask or position is off by far more
# The window stays 5. With a head of its own a random model does not say one token again and again.
LONG = {"max_position_embeddings": CTX, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint(**LONG)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Path:
    return tiny_bundle([("dynamic", CTX, CTX)], **LONG)


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle)


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return shutil.copytree(bundle, tmp_path / "own")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Gemma3ForCausalLM:
    loaded = Gemma3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    return loaded.eval()


@torch.no_grad()
def greedy(model: Gemma3ForCausalLM, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """PyTorch's tokens, and the logits [count, V] that each was chosen from, over its own growing cache."""
    cache, ids, tokens, logits = DynamicCache(config=model.config), torch.tensor([prompt]), [], []
    for _ in range(count):
        logits.append(model(ids, past_key_values=cache).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(logits).numpy()


def random_prompt(length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(length).integers(6, 272, length)]


@pytest.mark.parametrize("length", [1, 4, 6, 140])
def test_greedy_tokens_and_logits_are_those_of_pytorch(
    engine: Engine, model: Gemma3ForCausalLM, length: int
) -> None:
    prompt = random_prompt(length)
    tokens, truth = greedy(model, prompt, STEPS)
    engine.reset()
    graphs, found = engine.graphs, []
    logits = graphs.prefill([prompt])
    for expected in truth:
        assert np.abs(logits[0] - expected).max() <= FP32 * np.abs(expected).max()
        found.append(int(logits[0].argmax()))
        logits = graphs.decode([found[-1]])
    assert found == tokens
    assert len(set(tokens)) > 9


def test_a_chat_continues_what_is_held(engine: Engine, model: Gemma3ForCausalLM) -> None:
    engine.reset()
    first = random_prompt(9)
    answer = [step.token for step in engine.stream(first, max_new_tokens=6)]
    second = [*first, *answer, *random_prompt(7)]
    parted = [*second[:11], 9, 8]  # the cache is cut behind its eleventh token
    for prompt in (second, parted):
        step = next(engine.stream(prompt, max_new_tokens=1))
        tokens, logits = greedy(model, prompt, 1)
        assert step.token == tokens[0]
        likeliest = torch.log_softmax(torch.from_numpy(logits[0]).double(), 0).max()
        assert step.logprob == pytest.approx(float(likeliest), abs=1e-4)


def test_the_context_limit_ends_a_text(engine: Engine, model: Gemma3ForCausalLM) -> None:
    engine.reset()
    prompt = random_prompt(CTX - 2)
    steps = list(engine.stream(prompt, max_new_tokens=50))
    assert [step.token for step in steps] == greedy(model, prompt, 3)[0]
    assert [step.finish_reason for step in steps] == [None, None, "context"]


@torch.no_grad()
def test_the_window_bites(checkpoint: Path, model: Gemma3ForCausalLM) -> None:
    """Without the window the same tokens give other logits: the tests above would see a missing mask."""
    from stillgraph.exporter.checkpoint import open_checkpoint

    spec = open_checkpoint(str(checkpoint)).spec
    seen = masks(spec, torch.arange(20)[None], 20)
    assert not torch.equal(seen["sliding_attention"], seen["full_attention"])
    assert int((seen["sliding_attention"][0, 0, 19] == 0).sum()) == 5


def test_names_and_files_are_those_of_a_static_bundle(bundle: Path, tiny_bundle: Callable[..., Path]) -> None:
    manifest, static = read(bundle), read(tiny_bundle(DECODE, **LONG))
    check_files(bundle, manifest, hashes=True)
    assert [entry.shape.name for entry in manifest.graphs.values()] == ["dynamic"]
    graph, decode = manifest.graphs["dynamic"], static.graphs["decode-40"]
    assert [p.name for p in graph.outputs] == [p.name for p in decode.outputs]
    assert [p.name for p in graph.inputs] == [p.name for p in decode.inputs if p.name != "past_length"]
    pairs = [(alias.output, alias.input) for alias in graph.aliases]
    assert pairs == [(alias.output, alias.input) for alias in decode.aliases]
    assert {file.path for file in manifest.files} == {file.path for file in static.files}
    assert set(manifest.weights.tensors) == set(static.weights.tensors)
    assert (manifest.target, manifest.precision) == ("portable", "fp32")
    assert manifest.calling.tokens == static.calling.tokens


def test_the_file_says_its_lengths_and_pads_nothing(bundle: Path) -> None:
    graph = onnx.load(bundle / "dynamic.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)]
    assert not {node.op_type for node in graph.graph.node} & (FORBIDDEN | {"ScatterND", "ScatterElements"})
    assert "not a number" in (static_problem(graph.graph) or "")  # of a static graph this is an error
    session = ort.InferenceSession(str(bundle / "dynamic.onnx"), providers=["CPUExecutionProvider"])
    shapes = {port.name: port.shape for port in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == [1, NEW]
    assert shapes["logits"] == [1, 1, 272]
    for layer in range(2):
        assert all(shapes[name] == [1, 2, PAST, 24] for name in past_names(layer))
        assert all(shapes[name] == [1, 2, TOTAL, 24] for name in present_names(layer))


def test_inspect_shows_lengths_and_the_limit(bundle: Path) -> None:
    inspection = inspect(bundle)
    assert (inspection.ranges.ctx, inspection.ranges.max_len, inspection.ranges.batch) == (CTX, CTX, 1)
    assert [layer.capacity for layer in inspection.memory.layers] == [CTX, CTX]
    assert inspection.memory.cache == 2 * 2 * (2 * CTX * 24) * 4
    assert inspection.graphs["dynamic"].largest_activation is None
    assert len(tables(inspection)) == 4


def test_simplifying_it_again_changes_nothing_it_computes(own: Path) -> None:
    change = resimplify(own, lambda line: None)["dynamic"]
    assert change.worst_difference <= FP32
    assert next(load(own).stream([3, 9], max_new_tokens=1)).token == next(load(own).stream([3, 9])).token


def test_validation_holds_it_to_pytorch(own: Path) -> None:
    parity = validate(own, depth="default", say=lambda line: None)
    assert parity.passed, parity.problem()
    assert read(own).validation == parity.validation()
    prompts = [case.prompt for case in parity.cases if case.text == "random" and not case.optimized]
    assert prompts == [1, 2, 2, 4, 4, 5, 5, 6, 6, CTX - 1, CTX - 1]  # at once, and in two calls
    assert max(c.position for case in parity.cases for c in case.comparisons) == CTX - 1


def test_validation_sees_a_wrong_window(own: Path) -> None:
    path = own / "dynamic.onnx"
    graph = onnx.load(path, load_external_data=False)
    numbers = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT64]
    windows = [number for number in numbers if onnx.numpy_helper.to_array(number).tolist() == 5]
    assert len(windows) == 1
    windows[0].CopyFrom(onnx.numpy_helper.from_array(np.array(6, np.int64), windows[0].name))
    path.write_bytes(graph.SerializeToString())
    parity = validate(own, depth="quick", say=lambda line: None)
    assert {case.prompt for case in parity.cases if not parity.within_bound(case)} == {4, 5, 6, CTX - 1}


def test_compile_refuses_it_in_one_sentence(refused: Refused, own: Path) -> None:
    with refused("compile", "growing lengths", "static graphs"):
        compile_bundle(own, lambda line: None)
    assert not (own / "compiled").exists()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"batch": 2}, "--batch 2"),
        ({"precision": "int8"}, "--precision int8"),
        ({"target": "onnxruntime"}, "--target onnxruntime"),
    ],
)
def test_what_a_baseline_is_not_made_of(refused: Refused, values: dict[str, object], word: str) -> None:
    config = request(**({"model": "demo", "target": "portable", "precision": "fp32", "batch": 1} | values))
    with refused("export", word, "dynamic"):
        dynamic_shape(config, 64)


def test_contexts_that_cannot_be(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(model=str(checkpoint), out=tmp_path / "out")
    with refused("export", "--ctx 1 "):
        dynamic_shape(config, 1)
    with refused("export", "--ctx 257", "max_position_embeddings of 256"):
        export(config, [dynamic_shape(config, 257)], replace=False, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_growing_and_static_graphs_do_not_share_a_bundle(
    refused: Refused, checkpoint: Path, bundle: Path, tiny_bundle: Callable[..., Path]
) -> None:
    static, shape = tiny_bundle(DECODE, **LONG), GraphShape(role="dynamic", max_len=40, ctx=40)
    model = read(static).source.id
    with refused("export", "lengths static", "has growing", "--out"):
        export(ExportConfig(model=model, out=static), [shape], replace=False, say=lambda line: None)
    decode = GraphShape(role="decode", max_len=1, ctx=CTX)
    with refused("export", "lengths growing", "has static"):
        export(
            ExportConfig(model=str(checkpoint), out=bundle), [decode], replace=False, say=lambda line: None
        )


def test_the_command_makes_it_beside_the_static_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, GraphShape]] = []
    monkeypatch.setattr(cli, "_add", lambda config, shapes, output: asked.append((config.place, *shapes)))
    for arguments in ([], ["--model", "some/tiny", "--ctx", "64"]):
        result = CliRunner().invoke(cli.app, ["dynamic", *arguments])
        assert result.exit_code == 0, result.output
    assert asked == [
        (Path("artifacts/demo-dynamic"), GraphShape(role="dynamic", max_len=1024, ctx=1024)),
        (Path("artifacts/tiny-dynamic"), GraphShape(role="dynamic", max_len=64, ctx=64)),
    ]


def test_the_report_of_the_simplification_has_it(bundle: Path) -> None:
    report = json.loads((bundle / "reports" / "simplify.json").read_text())
    assert report["worst_difference"]["dynamic"] <= FP32
