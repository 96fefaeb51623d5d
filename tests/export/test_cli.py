"""The export's command line: what it refuses, what goes to stdout, what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from stillgraph import cli
from stillgraph.exporter.validate import metrics
from stillgraph.exporter.validate.report import CaseResult, Parity
from stillgraph.exporter.validate.table import Comparison
from stillgraph.files import check_files, describe
from stillgraph.manifest import Validation, read

SIZES = ["--max-len", "8", "--ctx", "16"]


@pytest.fixture
def own_bundle(tiny_bundle, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return shutil.copytree(tiny_bundle(), tmp_path / "own")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["export"], ["prefill", "decode", "bundle"]),
        (
            ["export", "prefill"],
            ["--max-len", "--ctx", "--model", "--target", "--precision", "--batch", "--out"],
        ),
        (["export", "decode"], ["--block-size", "--asymmetric", "--keep", "--fast-prefill", "128"]),
        (["export", "decode"], ["--ctx", "--json", "--quiet"]),
        (["export", "bundle"], ["--max-len", "--ctx"]),
        (["simplify"], ["BUNDLE", "--json"]),
        (["validate"], ["BUNDLE", "--model", "--full", "--quick", "--text", "--table"]),
        (["inspect"], ["BUNDLE", "--json"]),
        (["prove"], ["SUBJECT", "--check", "--model", "--full", "--quick", "--json"]),
    ],
)
def test_help(capsys, command, words) -> None:
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert [word for word in words if word.lower() not in out.lower()] == []


def test_python_m_export_is_the_same_command() -> None:
    command = [sys.executable, "-m", "stillgraph.exporter", "prefill", "--max-len", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = "error: export: --max-len 0 is not a number of tokens; use 1 or more.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("arguments", [["--max-len", "many"], ["--nothing"], ["extra"]])
def test_options_that_cannot_be_read_are_exit_code_2(capsys, arguments) -> None:
    assert cli.main(["export", "prefill", *arguments]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", ["simplify", "validate", "inspect", "prove"])
def test_a_folder_that_is_no_bundle(tmp_path, capsys, command) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert "has no manifest.json; name a folder made by 'stillgraph export'." in capsys.readouterr().err


def test_full_and_quick_are_two_things(tmp_path, capsys) -> None:
    assert cli.main(["validate", str(tmp_path), "--full", "--quick"]) == 2
    assert "--full and --quick were both given; give one of them." in capsys.readouterr().err


def test_bundle_exports_and_validates_in_one_line_of_json(tiny_checkpoint, tmp_path, capsys) -> None:
    out = tmp_path / "bundle"
    command = ["export", "bundle", *SIZES, "-m", str(tiny_checkpoint()), "--out", str(out)]
    assert cli.main([*command, "--json", "--quiet"]) == 0
    stdout, stderr = capsys.readouterr()
    line = json.loads(stdout)
    assert (stdout.count("\n"), stderr) == (1, "")
    assert line["graphs"] == {"prefill-8": "prefill-8.onnx", "decode-16": "decode-16.onnx"}
    assert line["validation"]["passed"] is True
    assert line["nbytes"] == sum(file.nbytes for file in read(out).all_files())


def test_a_second_export_adds_its_graph(tiny_checkpoint, tmp_path, capsys) -> None:
    shared = ["-m", str(tiny_checkpoint()), "--out", str(tmp_path / "bundle")]
    assert cli.main(["export", "prefill", "--max-len", "8", *shared]) == 0
    first, progress = capsys.readouterr()
    assert cli.main(["export", "decode", "--ctx", "16", *shared, "--quiet"]) == 0
    second, silence = capsys.readouterr()
    assert "tracing prefill-8\n" in progress
    assert silence == ""
    assert "decode-16.onnx" not in first
    assert "prefill-8.onnx" in second
    assert "decode-16.onnx" in second


def test_validate_exits_1_when_a_bound_is_broken(own_bundle, capsys) -> None:
    weights = own_bundle / "weights.data"
    values = np.fromfile(weights, np.float32)
    values[: values.size // 2] *= 1.01
    values.tofile(weights)
    raw = json.loads((own_bundle / "manifest.json").read_text())
    raw["weights"]["file"] = describe(own_bundle, weights).model_dump()
    (own_bundle / "manifest.json").write_text(json.dumps(raw))
    assert cli.main(["validate", str(own_bundle), "--quick", "--json", "--quiet"]) == 1
    stdout, stderr = capsys.readouterr()
    assert (json.loads(stdout)["passed"], stdout.count("\n")) == (False, 1)
    assert stderr.startswith("error: validate: a relative error of ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(("option", "depth"), [(None, "default"), ("--full", "full"), ("--quick", "quick")])
def test_validate_passes_on_what_it_was_asked_for(
    own_bundle, tmp_path, monkeypatch, capsys, option, depth
) -> None:
    errors = dict.fromkeys(("max_error", "mean_error", "relative_error", "kl"), 0.0)
    same = (metrics.Comparison(row=0, position=3, top1_equal=True, **errors),)
    case = CaseResult(
        text="random",
        optimized=True,
        start="prefill",
        prompt=3,
        comparisons=same,
        cache_errors=(0.0,),
        checks=(),
    )
    asked: list[tuple[Path, str | None, str, list[Path]]] = []

    def fake(bundle, *, model, depth, texts, say) -> Parity:
        say("[bold]")
        asked.append((bundle, model, depth, texts))
        return Parity(date="2020-01-01", depth=depth, why_bound="why", tools={},
                      graphs={}, weights="", cases=(case,))  # fmt: skip

    monkeypatch.setattr("stillgraph.exporter.validate.validate.validate", fake)
    text, table = tmp_path / "own.txt", tmp_path / "table.json"
    text.write_text("A ferry, a bridge and a tide. " * 50)
    command = ["validate", str(own_bundle), str(own_bundle), "-m", "demo", *([option] if option else [])]
    assert cli.main([*command, "--text", str(text), "--table", str(table)]) == 0
    assert asked == [(own_bundle, "demo", depth, [text])] * 2
    assert Comparison.model_validate_json(table.read_text()).model == Path(read(own_bundle).source.id).name
    stdout, stderr = capsys.readouterr()
    assert "passed" in stdout
    assert stderr == "[bold]\n" * 2


def test_inspect_tells_what_is_in_a_bundle(tiny_bundle, capsys) -> None:
    bundle = tiny_bundle()
    assert cli.main(["inspect", str(bundle), "--json"]) == 0
    stdout = capsys.readouterr().out
    line = json.loads(stdout)
    assert stdout.count("\n") == 1
    ranges = {"batch": 1, "vocabulary": 272, "max_len": 16, "continues_cache": True, "ctx": 40}
    assert line["ranges"] == ranges
    layer_bytes = 2 * 2 * 40 * 24 * 4  # keys and values, KV, C, D, fp32
    assert [layer["nbytes"] for layer in line["memory"]["layers"]] == [layer_bytes] * 2
    assert [layer["window"] for layer in line["memory"]["layers"]] == [5, None]
    assert line["memory"]["cache"] == 2 * layer_bytes
    graph = line["graphs"]["decode-40"]
    assert sum(graph["ops"].values()) == graph["nodes"]
    assert 0 < line["memory"]["weights"] <= line["files"]["weights.data"]
    assert cli.main(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    for words in ("1 to 16 tokens a call; longer ones in chunks, 40 in all", "0 to 271", "MatMul"):
        assert words in shown


def test_the_largest_activation_is_no_weight_input_or_output() -> None:
    from stillgraph.exporter.bundle.inspection import largest_activation

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape)

    nodes = [onnx.helper.make_node("Relu", [a], [b]) for a, b in ("ab", "bc", "cd")]
    graph = onnx.helper.make_graph(nodes, "g", [value("a", 99)], [value("d", 99)])
    graph.value_info.extend([value("a", 99), value("b", 2, 3), value("c", 5)])
    found = largest_activation(graph)
    assert found is not None
    assert (found.name, found.op, found.dtype, found.shape, found.nbytes) == (
        "b",
        "Relu",
        "float16",
        (2, 3),
        12,
    )


def validated(bundle: Path) -> None:
    """Give a bundle the result of a validation."""
    result = Validation(
        passed=True, date="2020-01-01", cases=1, max_relative_error=0, worst_ratio=0, top1_agreement=1
    )
    manifest = read(bundle).model_copy(update={"validation": result})
    (bundle / "manifest.json").write_text(manifest.to_json())


def with_an_identity(bundle: Path) -> None:
    """A decode graph as an older version might have left it: one node too many, before the logits."""
    manifest = read(bundle)
    entry = manifest.graph("decode")
    assert entry is not None
    model = onnx.load(bundle / entry.file.path, load_external_data=False)
    maker = next(node for node in model.graph.node if "logits" in node.output)
    maker.output[list(maker.output).index("logits")] = "unnamed"
    model.graph.node.append(onnx.helper.make_node("Identity", ["unnamed"], ["logits"]))
    (bundle / entry.file.path).write_bytes(model.SerializeToString())
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["graphs"]["decode-40"]["file"] = describe(bundle, bundle / entry.file.path).model_dump()
    raw["graphs"]["decode-40"] |= {"weights": [], "ops": {}}  # which are of the nodes
    (bundle / "manifest.json").write_text(json.dumps(raw))


def test_simplify_changes_a_graph_and_drops_its_validation(own_bundle, capsys) -> None:
    validated(own_bundle)
    simple = read(own_bundle).graphs["decode-40"]
    with_an_identity(own_bundle)
    assert cli.main(["simplify", str(own_bundle), "--json", "--quiet"]) == 0
    line = json.loads(capsys.readouterr().out)
    decode = line["graphs"]["decode-40"]
    assert (decode["changed"], line["graphs"]["prefill-16"]["changed"]) == (True, False)
    assert decode["nodes_after"] == decode["nodes_before"] - 1
    manifest = read(own_bundle)
    check_files(own_bundle, manifest, hashes=True)
    assert manifest.validation is None
    again = manifest.graphs["decode-40"]
    assert (set(again.weights), again.tables, again.ops) == (set(simple.weights), simple.tables, simple.ops)
    report = json.loads((own_bundle / "reports" / "simplify.json").read_text())
    assert report["graphs"]["decode-40"][0]["nodes_before"] == decode["nodes_before"]


def test_simplify_leaves_a_bundle_that_is_simple_as_it_was(own_bundle, capsys) -> None:
    validated(own_bundle)
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in own_bundle.rglob("*.*")}
    assert cli.main(["simplify", str(own_bundle)]) == 0
    assert "no graph changed; the bundle is as it was" in capsys.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in own_bundle.rglob("*.*")} == before


def test_simplify_that_would_change_numbers_leaves_the_bundle(own_bundle, monkeypatch, capsys) -> None:
    import stillgraph.exporter.bundle.resimplify
    from stillgraph.errors import CheckFailed

    def differ(before: Path, after: Path, aliases: object) -> float:
        raise CheckFailed("simplify", f"{after.name} differs", "please report this bug")

    with_an_identity(own_bundle)
    before = {path: path.read_bytes() for path in own_bundle.rglob("*.*")}
    monkeypatch.setattr(stillgraph.exporter.bundle.resimplify, "same_outputs", differ)
    assert cli.main(["simplify", str(own_bundle), "--quiet"]) == 1
    assert "differs; please report this" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in own_bundle.rglob("*.*")} == before
    assert [path.name for path in own_bundle.parent.iterdir()] == ["own"]
