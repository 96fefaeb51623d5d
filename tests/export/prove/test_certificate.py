"""A certificate holds for the files that were proven, for no others, and is checked without torch."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from stillgraph import cli
from stillgraph.certificate import differences
from stillgraph.exporter.prove.certify import prove_bundle
from stillgraph.files import check_files, describe
from stillgraph.manifest import read
from tests.test_arrows import HEAVY

Refused = Callable[..., AbstractContextManager[None]]
PROOF, WEIGHTS = "reports/proof.json", "weights.data"


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def proven(tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(tiny_bundle(), tmp_path_factory.mktemp("proven") / "bundle"))
    found = prove_bundle(bundle, depth="quick", say=silent)
    assert found.parity.passed
    assert found.certificate.content.passed
    return bundle


@pytest.fixture
def own(proven: Path, tmp_path: Path) -> Path:
    """A proven bundle that a test may change; being elsewhere is no difference."""
    return Path(shutil.copytree(proven, tmp_path / "elsewhere", symlinks=True))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_it_says_what_was_proven_of_what_and_where(
    proven: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    raw = json.loads((proven / PROOF).read_text())
    content = raw["content"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert raw["sha256"] == digest(text.encode())
    files = {path.relative_to(proven).as_posix(): path for path in proven.rglob("*") if path.is_file()}
    del files[PROOF]
    assert {file["path"]: file["sha256"] for file in content["files"]} == {
        name: digest(path.read_bytes()) for name, path in files.items()
    }
    assert {"manifest.json", WEIGHTS, "decode-40.onnx", "reports/proof.html"} <= set(files)
    made_from = tiny_checkpoint()
    hashes = {file["path"]: file["sha256"] for file in content["checkpoint_files"]}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert hashes[name] == digest((made_from / name).read_bytes())
    assert content["report"] == json.loads((proven / "reports/parity.json").read_text())
    versions = content["versions"]
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (versions["onnxruntime"], versions["python"]) == (
        onnxruntime.__version__,
        platform.python_version(),
    )
    bounds = {(verdict["of"], verdict["measure"]): verdict for verdict in content["verdicts"]}
    assert {of for of, _ in bounds} == {"logits", "keys", "values"}
    checks = [c for case in content["report"]["cases"] for c in case["checks"] if c["what"] == "keys"]
    worst = max((c for c in checks if c["measure"] == "RMS"), key=lambda c: c["value"] / c["bound"])
    assert bounds["keys", "RMS"]["value"] == worst["value"]
    page = (proven / "reports/proof.html").read_text()
    assert ">Passed<" in page
    assert digest((proven / WEIGHTS).read_bytes()) in page
    assert "no signature" in page
    assert "<script" not in page


def test_the_same_files_elsewhere_are_proven_without_torch(own: Path) -> None:
    code = (
        f"import sys; from stillgraph import cli; code = cli.main(['prove', '--check', {str(own)!r}]);"
        f" print([name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said, modules = done.stdout.splitlines()[:-1], done.stdout.splitlines()[-1]
    assert (done.returncode, modules, done.stderr) == (0, "[]", "")
    assert "are as proven" in said[0]


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((bundle / PROOF).read_text())
    change(raw["content"])
    (bundle / PROOF).write_text(json.dumps(raw))


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit": (lambda b: flip(b / WEIGHTS), [f"{WEIGHTS}: as many bytes, and others"]),
    "longer": (lambda b: (b / WEIGHTS).open("ab").write(b"1"), [f"{WEIGHTS}: ", "bytes where"]),
    "gone": (lambda b: (b / "tokenizer.json").unlink(), ["tokenizer.json: missing"]),
    "page": (lambda b: flip(b / "reports/proof.html"), ["reports/proof.html: as many bytes"]),
    "report": (lambda b: flip(b / "reports/parity.json"), ["reports/parity.json: as many bytes"]),
    "manifest": (lambda b: (b / "manifest.json").write_text("{}"), ["manifest.json: 2 bytes where"]),
    "more": (lambda b: (b / "extra.onnx").write_text(""), ["extra.onnx: not in the certificate"]),
    "deep": (lambda b: ((b / "a/b").mkdir(parents=True), (b / "a/b/c").write_text("")), ["a/b/c: not in"]),
    "link": (lambda b: (b / "a").symlink_to("/usr"), ["a: not in the certificate"]),
    "verdict": (lambda b: edit(b, lambda c: c["verdicts"][0].update(value=0.0)), [f"{PROOF}: the hash of"]),
    "flags": (lambda b: edit(b, lambda c: c.update(cpu_flags=[])), [f"{PROOF}: the hash of"]),
    "file": (
        lambda b: edit(b, lambda c: c["files"].pop(0)),
        [f"{PROOF}: the hash of", "not in the certificate"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_told_in_a_line(own: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = CHANGES[name]
    count = 2 if name == "file" else 1
    change(own)
    assert cli.main(["prove", str(own), "--check"]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == count, out
    assert [word for word in words if word not in out] == []
    assert err.count("\n") == 1


def test_machines_may_compile_and_measure(own: Path) -> None:
    (own / "compiled/some-cpu").mkdir(parents=True)
    (own / "compiled/some-cpu/compiled.json").write_text("{}")
    (own / "reports/bench.json").write_text("{}")
    assert differences(own)[1] == []


def test_a_certificate_of_another_bundle(own: Path) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["source"]["checkpoint_sha256"] = "0" * 64
    (own / "manifest.json").write_text(json.dumps(manifest))
    lines = differences(own)[1]
    assert lines[0].startswith("the certificate is of another bundle: checkpoint ")
    assert lines[1].startswith("manifest.json: ")


def test_the_checkpoint_is_compared_on_request(
    own: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert differences(own, tiny_checkpoint())[1] == []
    assert cli.main(["prove", "--check", str(own), "-m", str(tiny_checkpoint(seed=9)), "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["differences"] == ["checkpoint model.safetensors: as many bytes, and others"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "is missing"), ("{", "is not a certificate"), ("[]", "is not a certificate"),
     ('{"content": {"format_version": 2}}', "format version 2"), ('{"content": {}}', "format version None")],
)  # fmt: skip
def test_no_certificate(own: Path, refused: Refused, content: str | None, word: str) -> None:
    if content is None:
        (own / PROOF).unlink()
    else:
        (own / PROOF).write_text(content)
    with refused("prove", "proof.json", word):
        differences(own)


def test_a_failure_is_certified_as_one(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that were wrong when their hash was taken."""
    place = read(own).weights.tensors["model.norm.weight.add"]
    with (own / WEIGHTS).open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(np.full(4, 1.5, np.float32).tobytes())
    assert cli.main(["prove", str(own), "--quick", "-q"]) == 2
    assert f"{WEIGHTS} is damaged" in capsys.readouterr().err
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["weights"]["file"] = describe(own, own / WEIGHTS).model_dump()
    (own / "manifest.json").write_text(json.dumps(manifest))
    check_files(own, read(own), hashes=True)
    assert cli.main(["prove", str(own), "--quick", "-q", "--json"]) == 1
    line = json.loads(capsys.readouterr().out)
    assert (line["passed"], "is over the bound" in line["findings"][0]) == (False, True)
    assert ">FAILED<" in (own / "reports/proof.html").read_text()
    (told,) = differences(own)[1]
    assert told.startswith(f"{PROOF}: it certifies a failure: ")
