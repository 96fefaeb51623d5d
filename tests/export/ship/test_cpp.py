"""The C++ driver against golden.json, whose tokens and logits are PyTorch's, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stillgraph.exporter.ship.check import answer_of
from stillgraph.exporter.ship.cpp import Cpp
from stillgraph.exporter.ship.runtimes import runtimes
from stillgraph.exporter.ship.ship import ship
from stillgraph.golden import GOLDEN, Compared, compare, read
from stillgraph.manifest import FORMAT_VERSION, MANIFEST
from tests.export.ship.conftest import proven_copy

Bundle = Callable[..., Path]
PATIENCE = 120
UNLOAD = "UNLOAD_PREFILL_BEFORE_DECODE"


@pytest.fixture(scope="module", params=["c++", "c++-ort"])
def program(request: pytest.FixtureRequest) -> Path:
    """Built before the tests, or none is run: that takes as long as all of them."""
    runtime = runtimes()[request.param]
    assert isinstance(runtime, Cpp)
    if reason := runtime.missing():
        pytest.skip(reason)
    if not runtime.built(runtime.library()).is_file():
        pytest.skip(f"the driver is not built: python -m {type(runtime).__module__}")
    return runtime.built(runtime.library())


@pytest.fixture(scope="module")
def growing(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tiny_bundle([("dynamic", 40, 40)])
    return proven_copy(bundle, tmp_path_factory.mktemp("cpp") / "growing")


@pytest.fixture(scope="module")
def quantized(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return proven_copy(tiny_bundle(precision="int8"), tmp_path_factory.mktemp("cpp") / "int8")


def run(program: Path, *arguments: str, unload: str = "0") -> list[dict[str, Any]]:
    """The lines of JSON that the program prints."""
    environment = {**os.environ, UNLOAD: unload}
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE, env=environment
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def compared(program: Path, bundle: Path, unload: str = "0") -> list[Compared]:
    golden = read(bundle)
    lines = run(program, str(bundle), "--golden", str(bundle / GOLDEN), unload=unload)
    pairs = zip(golden.cases, lines, strict=True)
    return [compare(case, answer_of(line), golden.tolerance) for case, line in pairs]


@pytest.mark.parametrize(("job", "unload"), [("growing", "0"), ("seeing", "1"), ("quantized", "0")])
def test_tokens_and_logits_are_those_of_pytorch(
    program: Path, job: str, unload: str, request: pytest.FixtureRequest
) -> None:
    if job == "quantized" and not program.name.startswith("c++-ort"):
        pytest.skip("OpenVINO takes no rows that end within a block, as those of a tiny model do")
    bundle: Path = request.getfixturevalue(job)
    golden = read(bundle)
    found = compared(program, bundle, unload)
    assert not [problem for one in found for problem in one.problems]
    for one, case in zip(found, golden.cases, strict=True):
        if one.near_tie is None:  # behind one, a text may go on in two ways
            assert (one.equal, one.steps) == (len(case.tokens), len(case.logits))
    assert sum(one.near_tie is None for one in found) >= (4 if job == "quantized" else len(found))
    assert (job == "seeing") == any(case.picture_png for case in golden.cases)


def test_it_is_shipped(program: Path, proven: Path, tmp_path: Path) -> None:
    runtime = runtimes()[program.name.rpartition("-")[0]]
    found = ship(proven, runtime, tmp_path / "one", lambda line: None)
    checked = found.checked
    assert (checked.cases, checked.equal, checked.problems, checked.reason) == (5, 5, (), None)
    assert 0 < checked.worst < 1e-5
    assert checked.versions.keys() == {"onnxruntime" if runtime.name == "c++-ort" else "openvino"}
    assert (found.folder / "CMakeLists.txt").is_file()
    assert "cmake --build build" in (found.folder / "README.md").read_text()
    again = ship(proven, runtime, tmp_path / "two", lambda line: None)
    assert found.archive.read_bytes() == again.archive.read_bytes()


def test_a_picture_is_laid_over_white_as_pillow_does_it(program: Path, seeing: Path, tmp_path: Path) -> None:
    """Transparent, gray, or of a palette: the logits are those after the same picture as plain RGB."""
    bundle = seeing
    (case,) = (case for case in read(bundle).cases if case.picture_png)
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA")
    pictures = [image, image.convert("LA"), image.convert("RGB").convert("P")]
    white = Image.new("RGBA", image.size, "white")
    plain = [Image.alpha_composite(white, odd.convert("RGBA")).convert("RGB") for odd in pictures]
    raw = json.loads((bundle / GOLDEN).read_text())
    one = case.model_dump(mode="json")
    raw["cases"] = [one | {"picture_png": png(picture)} for picture in [*pictures, *plain]]
    (tmp_path / GOLDEN).write_text(json.dumps(raw))
    lines = run(program, str(bundle), "--golden", str(tmp_path / GOLDEN))
    logits = [json.dumps(line["logits"]) for line in lines]
    assert logits[:3] == logits[3:]
    assert len(set(logits)) == 3


def png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def refusal(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"error: [a-z ]+: .+; .+\.", line), line
    return line


def change(bundle: Path, place: Path, **values: Any) -> str:
    copied = Path(shutil.copytree(bundle, place))
    raw = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({k: v for k, v in (raw | values).items() if v is not None}))
    return str(copied)


def test_a_wrong_bundle_is_one_sentence(program: Path, proven: Path, tmp_path: Path) -> None:
    bundle = proven
    ids = ("--token-ids", "2,17")
    assert "no such folder" in refusal(program, str(tmp_path / "none"), *ids)
    assert "no manifest.json" in refusal(program, str(tmp_path), *ids)
    assert f"understands {FORMAT_VERSION}" in refusal(
        program, change(bundle, tmp_path / "version", format_version=FORMAT_VERSION + 1), *ids
    )
    assert "calling" in refusal(program, change(bundle, tmp_path / "key", calling=None), *ids)
    copied = Path(shutil.copytree(bundle, tmp_path / "copied"))
    weights = copied / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "bytes and the manifest says" in refusal(program, str(copied), *ids)
    weights.unlink()
    assert "weights.data is missing" in refusal(program, str(copied), *ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--token-ids and --golden"),
        (["--token-ids", "x"], "'x'"),
        (["--token-ids", "272"], "vocabulary of 272"),
        (["--token-ids", ",".join(["3"] * 41)], "41 tokens"),
        (["--token-ids", "3", "--top-p", "0"], "top_p"),
        (["--token-ids", "3", "--color", "red"], "--color"),
        (["--golden", "/dev/null"], "no golden.json"),
    ],
)
def test_wrong_use_is_one_sentence(program: Path, proven: Path, arguments: list[str], words: str) -> None:
    assert words in refusal(program, str(proven), *arguments)


def test_a_seed_draws_the_same_tokens_and_one_of_one_is_greedy(program: Path, proven: Path) -> None:
    bundle = str(proven)

    def tokens(*options: str) -> list[int]:
        (line,) = run(program, bundle, "--token-ids", "2,17,5", "--max-new-tokens", "12", *options)
        found: list[int] = line["tokens"]
        return found

    warm = ("--temperature", "2")
    assert tokens(*warm, "--seed", "1") == tokens(*warm, "--seed", "1") != tokens(*warm, "--seed", "2")
    assert tokens(*warm, "--top-k", "1") == tokens() == tokens(*warm, "--top-p", "1e-6")
