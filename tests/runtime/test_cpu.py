"""What is said of a CPU, from the text of /proc/cpuinfo; and a bundle that needs what it does not have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillgraph import cpu, load
from stillgraph.cpu import describe_cpu, lacking
from stillgraph.errors import StillgraphError

X86 = "processor : 0\nmodel name : {}\nflags : fpu {}\n\nprocessor : 1\nmodel name : other\nflags : none\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "name"),
    [
        (X86.format("AMD EPYC", "avx2 avx512f"), "x86_64", "amd-epyc-avx512"),
        (
            X86.format("Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "avx2"),
            "x86_64",
            "intel-xeon-e5-2680-v4-avx2",
        ),
        (X86.format("AMD Ryzen 9 7950X 16-Core Processor", "avx2"), "x86_64", "amd-ryzen-9-7950x-avx2"),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm\n", "aarch64", "aarch64-i8mm"),
        ("", "AMD64", "amd64"),
    ],
)
def test_a_cpu_has_a_readable_name(cpuinfo: str, machine: str, name: str) -> None:
    assert describe_cpu(cpuinfo, machine).rpartition("-")[0] == name


def test_the_name_depends_on_the_instruction_sets_and_not_on_their_order() -> None:
    names = [describe_cpu(X86.format("AMD EPYC", flags), "x86_64") for flags in ("a b", "b a", "a b c")]
    assert names[0] == names[1] != names[2]


def test_the_name_of_this_cpu_is_a_folder_name() -> None:
    name = cpu.cpu_name()
    assert name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_")


def test_what_is_lacking_is_told_in_one_sentence(bundle_of, tmp_path, monkeypatch) -> None:
    """A bundle that needs an instruction set is refused on a CPU without it, before a graph is read."""
    bundle = bundle_of()
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    assert raw["requires"] == {"cpu": [], "onnxruntime": None}, (
        "nothing that is made today depends on a CPU's kernels"
    )
    raw["requires"]["cpu"] = ["avx2", "avx512_vnni"]
    path.write_text(json.dumps(raw))
    (tmp_path / "cpuinfo").write_text(X86.format("AMD EPYC", "avx2"))
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(StillgraphError, match=r"needs avx512_vnni.*does not have.*export"):
        load(bundle)
    (tmp_path / "cpuinfo").write_text(X86.format("AMD EPYC", "avx2 avx512_vnni"))
    load(bundle)


@pytest.mark.parametrize(("least", "found"), [("1.33", "1.32.0"), ("2.0", "1.99.1"), ("1.100", "1.99.dev3")])
def test_an_onnxruntime_that_is_too_old_is_told_in_one_sentence(bundle_of, monkeypatch, least, found) -> None:
    bundle = bundle_of()
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    raw["requires"]["onnxruntime"] = least
    path.write_text(json.dumps(raw))
    monkeypatch.setattr("onnxruntime.__version__", found)
    with pytest.raises(StillgraphError, match=f"needs onnxruntime {least} or newer and this is {found}"):
        load(bundle)
    monkeypatch.setattr("onnxruntime.__version__", f"{least}.0+local")
    load(bundle)


def test_a_system_that_does_not_tell_lacks_nothing(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", Path("/nowhere"))
    assert lacking(["avx2"]) == []
