"""Decoders of other exporters: what is right passes, and what is wrong is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from stillgraph import cli
from stillgraph.certificate import Place, differences
from stillgraph.exporter.checkpoint import open_checkpoint
from stillgraph.exporter.prove.certify import Proven
from stillgraph.exporter.prove.foreign import discover, find_graph
from stillgraph.exporter.prove.foreign_proof import prove_graph
from stillgraph.spec import ModelSpec
from tests.export.prove.foreign_model import changed, export_growing, in_int8, merged

Refused = Callable[..., AbstractContextManager[None]]
WINDOW, CTX = 5, 40


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def growing(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign") / "model.onnx"
    export_growing(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ModelSpec:
    return open_checkpoint(str(checkpoint)).spec


def prove(path: Path, checkpoint: Path) -> Proven:
    return prove_graph(path, model=str(checkpoint), depth="quick", ctx=CTX, say=silent)


def test_a_right_graph_passes_and_is_certified(
    growing: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prove", str(growing.parent), "-m", str(checkpoint), "--ctx", str(CTX), "-q", "--json"]
    assert cli.main(command) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["passed"], len(line["findings"])) == (True, 1)
    certificate, lines = differences(growing)
    assert lines == []
    content = certificate.content
    assert (content.subject, content.identity["precision"]) == ("graph", "fp32")
    assert [file.path for file in content.files] == ["model.onnx", "model.proof.html"]
    cases = content.report["cases"]
    assert {case["prompt"] for case in cases} == {1, 2, WINDOW - 1, WINDOW, WINDOW + 1, CTX - 1}
    assert {(case["text"], case["optimized"]) for case in cases} >= {("random", False), ("random", True)}
    assert {case["given"] for case in cases} == {"", "in two calls"}
    assert {check["what"] for case in cases for check in case["checks"]} == {"logits", "keys", "values"}
    assert 0 < max(c["relative_error"] for case in cases for c in case["comparisons"]) < 1e-5
    growing.write_bytes(content_before := growing.read_bytes())
    with growing.open("ab") as stream:
        stream.write(b"\0")
    assert cli.main(["prove", "--check", str(growing)]) == 1
    growing.write_bytes(content_before)


def test_a_graph_without_the_window_is_named(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = prove(changed(growing, tmp_path / "model.onnx", window=1000), checkpoint)
    pattern, layer, _ = found.certificate.content.findings
    assert pattern.startswith(f"Past the window of {WINDOW} its logits differ from the reference by ")
    assert f"at position {WINDOW} (" in pattern
    assert pattern.endswith("the sliding window is not in the graph, which gives what full attention gives.")
    assert layer.startswith("Keys and values are right below layer 1: ")  # layer 0 slides
    assert not found.parity.passed
    assert not differences(found.place.root / "model.onnx")[0].content.passed


def test_another_window_is_not_taken_for_none(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = prove(changed(growing, tmp_path / "model.onnx", window=WINDOW + 1), checkpoint)
    pattern = found.certificate.content.findings[0]
    assert pattern.startswith(f"Past the window of {WINDOW} its logits differ")
    assert pattern.endswith("up to there they are right.")


def test_wrong_positions_after_the_prompt_are_named(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = prove(changed(growing, tmp_path / "model.onnx", restarts=1), checkpoint)
    pattern = found.certificate.content.findings[0]
    assert pattern.startswith("Prompts given at once are right, and what continues a cache differs, first by")
    assert "at position 1 (" in pattern


def test_other_weights_are_wrong_from_the_first_token_on(
    growing: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    found = prove(growing, tiny_checkpoint(seed=9))
    pattern, *_, note = found.certificate.content.findings
    assert pattern.startswith("Logits differ from the first token on, ")
    assert note.startswith("Its keys and values are not laid out as transformers' are")


def test_a_merged_graph_is_told_which_branch(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert prove(merged(growing, tmp_path / "model.onnx"), checkpoint).parity.passed


def test_few_bits_are_compared_with_the_same_weights(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    """As written, at the bounds of fp32: table and head are one tensor here, and both are of int8."""
    coded = in_int8(growing, tmp_path / "model.onnx")
    found = prove_graph(coded, model=str(checkpoint), depth="default", ctx=CTX, say=silent)
    content = found.certificate.content
    assert content.identity["precision"] == "int8"
    assert found.parity.passed, found.parity.problem()
    assert {agreement.optimized for agreement in found.parity.agreements} == {True}
    plain = [case for case in found.parity.cases if not case.optimized]
    assert max(c.relative_error for case in plain for c in case.comparisons) < 1e-5
    assert any("Its int8 weights, apart from the graph, cost a mean KL of" in f for f in content.findings)
    found = prove(changed(coded, tmp_path / "model.onnx", window=1000), checkpoint)
    assert not found.parity.passed
    assert {check.measure for _, check in found.parity.broken} == {"RMS"}
    pattern = found.certificate.content.findings[0]
    assert pattern.startswith(f"Past the window of {WINDOW} its logits differ")
    assert "full attention" in pattern


def inputs(graph: Path, path: Path, change: Callable[[onnx.GraphProto], object]) -> Path:
    """A copy with other ports."""
    model = onnx.load(graph)
    change(model.graph)
    onnx.save(model, path)
    return path


def size(graph: onnx.GraphProto, name: str, axis: int, value: int) -> None:
    (port,) = [port for port in graph.input if port.name == name]
    port.type.tensor_type.shape.dim[axis].dim_value = value


def without(graph: onnx.GraphProto, name: str) -> None:
    (port,) = [port for port in graph.output if port.name == name]
    graph.output.remove(port)


def more(graph: onnx.GraphProto, name: str, sizes: list[int | str], kind: int = TensorProto.INT64) -> None:
    graph.input.append(helper.make_tensor_value_info(name, kind, sizes))


PAST = "past_key_values.0.key"
REFUSALS: dict[str, tuple[Callable[[onnx.GraphProto], object], str]] = {
    "unknown": (lambda g: more(g, "beam_idx", ["n"]), "takes beam_idx"),
    "rank": (lambda g: more(g, "cache_position", [1, "n"]), "takes cache_position of 2 dimensions where 1"),
    "dtype": (
        lambda g: more(g, "cache_position", ["n"], TensorProto.STRING),
        "takes cache_position of STRING",
    ),
    "ids": (lambda g: size(g, "input_ids", 1, 16), "takes input_ids of static shape [1, 16]"),
    "past": (lambda g: size(g, PAST, 2, 40), f"takes {PAST} of shape [1, 2, 40, 24], in which no one axis"),
    "present": (lambda g: without(g, "present.1.value"), "does not return the value of layer 1"),
    "logits": (lambda g: without(g, "logits"), "has no logits"),
    "layers": (
        lambda g: more(g, "past_key_values.2.key", [1, 2, "n", 24]),
        "of 5 names where the checkpoint has 4",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_driven_is_one_sentence(
    growing: Path, spec: ModelSpec, tmp_path: Path, refused: Refused, name: str
) -> None:
    change, words = REFUSALS[name]
    path = inputs(growing, tmp_path / "model.onnx", change)
    with refused("prove", str(path), "cannot be driven", words):
        discover(path, spec)


def test_an_op_without_its_library_is_one_sentence(
    growing: Path, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    def custom(graph: onnx.GraphProto) -> None:
        graph.node.append(helper.make_node("Mystery", ["logits"], ["more"], domain="some.company"))

    path = inputs(growing, tmp_path / "model.onnx", custom)
    with refused("prove", str(path), "ONNX Runtime does not load it", "some.company"):
        prove(path, checkpoint)


def test_a_folder_must_have_one_decoder(growing: Path, tmp_path: Path, refused: Refused) -> None:
    with refused("prove", str(tmp_path), "no ONNX file"):
        find_graph(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(growing.read_bytes())
    with refused("prove", "a.onnx, b.onnx, which all have keys and values"):
        find_graph(tmp_path)
    (tmp_path / "c.onnx").write_bytes(b"nothing")
    with refused("prove", "c.onnx is not ONNX"):
        find_graph(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "name the checkpoint with --model"), (["-m", "demo", "--ctx", "1"], "--ctx 1 leaves no room")],
)
def test_wrong_use(
    growing: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prove", str(growing), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_place_of_a_certificate(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "onnx").mkdir()
    assert Place.of(tmp_path / "decoder.onnx").certificate == tmp_path / "decoder.proof.json"
    assert Place.of(tmp_path).certificate == tmp_path / "reports/proof.json"
    with refused("prove", "proof.json is missing", "make it with 'stillgraph prove"):
        Place.find(tmp_path)
    with refused("prove", "no such file or folder"):
        Place.find(tmp_path / "nowhere")
    (tmp_path / "onnx/decoder.proof.json").touch()
    assert Place.find(tmp_path).root == tmp_path / "onnx"
    (tmp_path / "other.proof.json").touch()
    with refused("prove", "decoder.proof.json, other.proof.json", "name the graph"):
        Place.find(tmp_path)
