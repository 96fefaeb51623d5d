"""Bounds: each passes what is right under it, breaks a little over it, and says where."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import stillgraph
from stillgraph.exporter.validate.gates import Check, Gate, gate
from stillgraph.exporter.validate.measures import Measured
from stillgraph.exporter.validate.metrics import Magnitudes
from stillgraph.exporter.validate.validate import validate
from stillgraph.files import sha256
from stillgraph.manifest import MANIFEST, File, Manifest, read

Bundle = Callable[..., Path]
Checkpoint = Callable[..., Path]
OLD_BOUND = 1e-5  # of small models, whatever their weights do to errors
LAYERS = 6


def silent(_: str) -> None:
    """No progress."""


def measured(rms: float, worst: float, own: tuple[float, float]) -> Measured:
    """Three vectors of magnitude 1; the second has the worst error, the third the largest RMS."""
    squares, largest = np.array([0.0, 0.0, 3 * rms**2]), np.array([0.0, worst, 0.0])
    ones = Magnitudes(np.ones(3), np.ones(3))
    return Measured(
        "keys", 5, np.array([0, 1, 1]), np.array([7, 8, 9]), Magnitudes(squares, largest), ones, own
    )


def broken(checks: tuple[Check, ...]) -> list[tuple[str, int | None, int | None]]:
    return [(check.measure, check.layer, check.position) for check in checks if not check.holds]


@pytest.mark.parametrize(
    ("rms", "worst", "expected"),
    [
        (1.9e-5, 7.9e-5, []),
        (2.1e-5, 7.9e-5, [("RMS", 5, 9)]),
        (1.9e-5, 8.1e-5, [("worst", 5, 8)]),
        (4e-5, 32e-5, [("worst", 5, 8), ("RMS", 5, 9)]),  # 4 and 2 times the bound: the worst first
    ],
)
def test_errors_may_be_twice_and_eight_times_those_of_pytorch(
    rms: float, worst: float, expected: list[tuple[str, int, int]]
) -> None:
    assert broken(Gate(kind="own").checks([measured(rms, worst, (1e-5, 1e-5))])) == expected


def test_where_pytorch_makes_no_error_some_roundoffs_are_none() -> None:
    held, roundoff = Gate(kind="own"), 2.0**-24
    assert broken(held.checks([measured(3.9 * roundoff, 3.9 * roundoff, (0.0, 0.0))])) == []
    found = held.checks([measured(4.1 * roundoff, 4.1 * roundoff, (0.0, 0.0))])
    assert {measure for measure, *_ in broken(found)} == {"RMS", "worst"}


def test_no_number_is_over_every_bound() -> None:
    (rms, worst) = Gate(kind="own").checks([measured(math.nan, math.nan, (1.0, 1.0))])
    assert not rms.holds
    assert not worst.holds
    assert rms.ratio == worst.ratio == math.inf


def test_what_rounding_may_do_to_logits_depends_on_how_many_there_are(tiny_bundle: Bundle) -> None:
    held = gate(read(tiny_bundle()).model, "int8")
    assert held.kind == "rounded"
    assert [check.holds for check in held.logits(kl=0.19, misses=0.32, positions=1000)] == [True, True]
    assert [check.holds for check in held.logits(kl=0.21, misses=0.34, positions=1000)] == [False, False]
    # 4 of 8 are 1.2 standard deviations from three tenths, 6 of 8 are 2.8.
    assert [held.logits(0.0, misses / 8, 8)[1].holds for misses in (4, 6)] == [True, False]


@pytest.fixture(scope="module")
def amplifying(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose attention is nearly hard, so that a roundoff grows a hundredfold; and its bundle."""
    folder = tmp_path_factory.mktemp("amplifying")
    made = tiny_checkpoint(family="llama", num_hidden_layers=LAYERS)
    checkpoint = Path(shutil.copytree(made, folder / "tiny"))
    tensors = load_file(checkpoint / "model.safetensors")
    gains = {"q_proj": 2.0, "k_proj": 2.0, "layernorm": 10.0, "down_proj": 3.0}
    for name, tensor in tensors.items():
        tensor *= next((gain for part, gain in gains.items() if part in name), 1.0)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    bundle = stillgraph.export(checkpoint, folder / "bundle", max_len=16, ctx=40, validate=False)
    return checkpoint, bundle


@pytest.fixture
def amplified(amplifying: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(amplifying[1], tmp_path / "bundle"))


def test_weights_that_amplify_roundoffs_pass(amplified: Path) -> None:
    parity = validate(amplified, depth="default", say=silent)
    assert parity.passed, parity.problem()
    assert parity.max_cache_error > OLD_BOUND
    assert parity.max_relative_error > OLD_BOUND
    assert parity.top1_agreement == 1.0
    assert 0.1 < parity.worst_ratio < 1
    assert read(amplified).validation == parity.validation()


def write(bundle: Path, name: str, values: np.ndarray) -> None:
    with (bundle / "weights.data").open("r+b") as file:
        file.seek(read(bundle).weights.tensors[name].offset)
        file.write(values.tobytes())


def weight(bundle: Path, part: str) -> tuple[str, np.ndarray]:
    """The one stored tensor with these words in its name, and its numbers in fp32."""
    ((name, place),) = [(k, v) for k, v in read(bundle).weights.tensors.items() if part in k]
    return name, np.fromfile(bundle / "weights.data", np.float32, place.nbytes // 4, offset=place.offset)


def test_a_scale_that_is_a_little_off_is_found_in_its_layer(amplified: Path) -> None:
    name, values = weight(amplified, "layers.3.self_attn.v_proj")
    write(amplified, name, values * np.float32(1.0001))
    parity = validate(amplified, depth="quick", say=silent)
    layers = {(check.what, check.layer) for _, check in parity.broken if check.layer is not None}
    assert ("values", 3) in layers
    assert min(layer for _, layer in layers) == 3
    ratios = [check.ratio for _, check in parity.broken]
    assert len(ratios) > 10
    assert ratios == sorted(ratios, reverse=True)
    assert f"{len(ratios) - 1} more bounds are broken" in (parity.problem() or "")
    assert parity.tables()[1].row_count == len(ratios)
    page = (amplified / "reports/parity.html").read_text()
    assert page.count("<td>values</td>") == sum(check.what == "values" for _, check in parity.broken)
    cases = json.loads((amplified / "reports/parity.json").read_text())["cases"]
    over = [c for case in cases for c in case["checks"] if c["value"] > c["bound"]]
    assert len(over) == len(ratios)


def test_two_layers_in_each_others_place_are_found(amplified: Path) -> None:
    (first, low), (second, high) = (weight(amplified, f"layers.{n}.self_attn.o_proj") for n in (2, 4))
    write(amplified, first, high)
    write(amplified, second, low)
    parity = validate(amplified, depth="quick", say=silent)
    layers = [check.layer for _, check in parity.broken if check.layer is not None]
    assert min(layers) == 3  # the first whose keys and values come after that attention


def change(bundle: Path, spoil: Callable[[onnx.ModelProto], None], role: str = "decode") -> None:
    """Spoil one graph of a bundle, and its hash in the manifest."""
    manifest = read(bundle)
    ((name, entry),) = [(k, v) for k, v in manifest.graphs.items() if v.shape.role == role]
    path = bundle / entry.file.path
    proto = onnx.load(path, load_external_data=False)
    spoil(proto)
    onnx.save(proto, path)
    file = File(path=entry.file.path, nbytes=path.stat().st_size, sha256=sha256(path))
    graphs = manifest.graphs | {name: entry.model_copy(update={"file": file})}
    changed: Manifest = manifest.model_copy(update={"graphs": graphs})
    (bundle / MANIFEST).write_text(changed.to_json())


def read_every_slot(proto: onnx.ModelProto) -> None:
    """A graph that lets a hundred-millionth of what is in any slot into its logits."""
    past = next(port.name for port in proto.graph.input if "value" in port.name)
    maker = next(node for node in proto.graph.node if "logits" in node.output)
    maker.output[list(maker.output).index("logits")] = "clean"
    small = onnx.numpy_helper.from_array(np.float32(1e-8), "small")
    proto.graph.initializer.append(small)
    proto.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMax", [past], ["peak"], keepdims=0),
            onnx.helper.make_node("Mul", ["peak", "small"], ["leak"]),
            onnx.helper.make_node("Add", ["clean", "leak"], ["logits"]),
        ]
    )


def test_a_slot_that_is_not_to_be_read_is_seen_when_it_is(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """What is in unused slots must be far larger than any value, or so small a leak is not seen."""
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))
    change(bundle, read_every_slot)
    parity = validate(bundle, depth="quick", say=silent)
    assert {(check.what, check.layer) for _, check in parity.broken} == {("logits", None)}


def widen(proto: onnx.ModelProto) -> None:
    """A window of W + 1, in an op's attribute."""
    sizes = [a for node in proto.graph.node for a in node.attribute if a.name == "local_window_size"]
    windows = [size for size in sizes if size.i > 0]
    assert windows
    for window in windows:
        window.i += 1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_graphs_that_round_are_held_to_the_rms_of_keys_and_values(
    tiny_bundle: Bundle, tmp_path: Path, precision: str
) -> None:
    made = tiny_bundle(target="onnxruntime", precision=precision)
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    parity = validate(bundle, depth="quick", say=silent)
    assert parity.broken == []
    (whole,) = parity.agreements
    assert whole.positions == sum(len(case.comparisons) for case in parity.cases)
    assert 1e-6 < whole.kl < 1e-3
    change(bundle, widen, "prefill")
    found = validate(bundle, depth="quick", say=silent).broken
    assert found[0][1].ratio > 5
    assert {check.measure for _, check in found} >= {"RMS"}


def test_graphs_that_round_are_held_to_the_logits_of_all_positions(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    made = tiny_bundle(target="onnxruntime", precision="int8")
    bundle = Path(shutil.copytree(made, tmp_path / "bundle"))
    name, values = weight(bundle, "model.norm.weight")
    write(bundle, name, -values)  # after all keys and values
    parity = validate(bundle, depth="quick", say=silent)
    assert {check.measure for _, check in parity.broken} == {"mean KL", "top-1 misses"}
    assert "divergence" in (parity.problem() or "") + "".join(str(check) for _, check in parity.broken)
