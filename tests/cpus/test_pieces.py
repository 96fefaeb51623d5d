"""What `make cpus` is made of, as far as it needs no emulator."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cpus import arm, emulated, lanes, products, rounding, sums, table, ties, trial
from tests.cpus.cases import BUNDLES
from tests.cpus.lanes import LANES
from tests.cpus.probe import Found, Product

SSE, AVX2 = ["SSE42"], ["SSE42", "AVX", "AVX2"]
CASE = next(case for case in products.cases() if case.product == "blocked int4 b32 symmetric")
FOUND = Found(
    features=SSE,
    products={"a": Product(3, 3, None), "b": Product(3, 1, None)},
    full_range=True,
    precise=True,
    rounding={"int8": "by block", "int4": "not"},
    tokens={bundle.name: [[1, 2], [3]] for bundle in BUNDLES},
)


def test_a_lane_knows_a_cpu_that_is_not_of_its_class() -> None:
    assert LANES["sse"].is_not(SSE) is None
    assert LANES["sse"].is_not(AVX2) == "it has AVX, AVX2"
    assert LANES["avx2"].is_not(AVX2) is None
    assert LANES["avx2"].is_not(SSE) == "it lacks AVX2"
    assert LANES["arm"].is_not(["ASIMD", "ASIMDDP"]) == "it has ASIMDDP"


def test_the_native_class_is_read_from_cpuinfo() -> None:
    text = "model name\t: Some CPU @ 2 GHz\nflags\t\t: sse4_2 avx2 avx512bw avx512_vnni\n"
    assert lanes.native(text) == ("Some CPU @ 2 GHz: avx512_vnni, avx512bw, avx2", "vpdpbusd")
    text = arm.cpuinfo(LANES["arm-dot"].arm or pytest.fail("no Arm"))
    assert lanes.native(text) == ("Arm part 0xd0b: asimddp, asimd", "udot, sdot")


def test_files_with_marked_tests_are_found() -> None:
    names = {Path(name).name for name in emulated.marked()}
    assert {"test_products.py", "test_lower.py", "test_row_scales.py", "test_lane.py"} <= names


def test_no_emulator_is_one_line_and_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert emulated.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    trials = [trial.run(lane, tmp_path) for lane in LANES.values()]
    assert table.render(trials).count("NOT TRIED: no qemu-") == len(LANES)
    with pytest.raises(arm.Missing, match="no debootstrap: apt-get install debootstrap"):
        arm.Arm(tmp_path)


def test_found_survives_json() -> None:
    assert Found.from_json(FOUND.to_json()) == FOUND


def test_what_is_wrong_is_told() -> None:
    assert trial._problems(LANES["sse"], FOUND) == []
    assert trial._problems(None, replace(FOUND, products={"a": Product(1, 0, "off")})) == ["off"]
    assert len(trial._problems(LANES["avx2"], FOUND)) == 2  # it lacks AVX2; full-range codes are exact
    assert len(trial._problems(LANES["sse"], replace(FOUND, full_range=False, precise=False))) == 2


def test_the_table_has_a_row_for_what_was_tried_and_what_was_not() -> None:
    tried = trial.Trial("native", "here", "vpdpbusd", FOUND, partings={"int8": [ties.Parting(1, 1e-3)]})
    died = trial.Trial("Arm", "qemu", "udot", problems=("it died: of something",))
    text = table.render([tried, died])
    cells = ["native", "here", "vpdpbusd", "1 of 2", "exact", "by block; not"]
    assert f"| {' | '.join([*cells, '2, 2, 2, 2 of 2', '2, 1, 2, 2 of 2', '0'])} |" in text
    assert "| Arm | qemu | udot | FAILED |" in text
    assert "- WRONG, Arm: it died: of something" in text
    assert "- native: int8: 1 of the prompts part" in text


class Bundle:
    """Prefers token 0 to token 1 by `gap` of the largest logit, after any token."""

    def __init__(self, gap: float) -> None:
        self.logits = np.array([[1.0, 1.0 - gap, -0.5]])
        self.fed: list[int] = []

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        return self.logits

    def decode(self, tokens: list[int]) -> np.ndarray:
        self.fed += tokens
        return self.logits


def engine(gap: float) -> Any:
    return SimpleNamespace(graphs=Bundle(gap), reset=lambda: None)


def test_tokens_may_part_at_a_near_tie_alone() -> None:
    near, far = engine(1e-3), engine(1e-2)
    assert ties.part(near, [7], [0, 0], [0, 0]) is None
    assert ties.part(near, [7], [0, 0], [0, 1]) == ties.Parting(1, pytest.approx(1e-3))
    assert near.graphs.fed == [0]
    tokens = {bundle.name: [[1, 0]] for bundle in BUNDLES}
    base = replace(FOUND, tokens=tokens | {"int8": [[0, 0]]})
    tried = trial.Trial("Arm", "", "", replace(FOUND, tokens=tokens))
    for gap, problems in ((near, 0), (far, 1)):
        engines = {bundle.name: gap for bundle in BUNDLES}
        assert len(trial.against(tried, base, engines, [[7]]).problems) == problems


def test_a_wrong_sum_is_seen(tmp_path: Path) -> None:
    products.build(CASE, tmp_path)
    assert sums.difference(tmp_path) is None
    with np.load(tmp_path / "case.npz") as case:
        arrays = dict(case)
    arrays["weights"][5, 3] += 1  # half of the smallest scale, once
    np.savez(tmp_path / "case.npz", **arrays)
    found = sums.difference(tmp_path)
    assert found is not None
    assert found.startswith("6 of 222 differ; worst at [0, 0, 5], ")


def test_what_is_in_steps_is_not_rounded() -> None:
    whole = np.resize(np.arange(-127.0, 128), (2, 3, 2 * rounding.BLOCK))
    whole[..., :: rounding.BLOCK] = 127
    np.testing.assert_allclose(rounding.by_block(whole / 8), whole / 8)
    rows = np.resize(np.arange(-100.0, 156), (2, 256)) / 8  # 255 steps of an eighth
    np.testing.assert_allclose(rounding.by_row(rows), rows)
    assert np.abs(rounding.by_row(whole) - whole).max() > 0
