"""The table for a deployer: each number in its row and column, as Markdown and as JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillgraph import cli
from stillgraph.exporter.validate.divergences import summarize
from stillgraph.exporter.validate.kinds import (
    Counted,
    FirstDifferences,
    Kind,
    LayerNoise,
    TextStatistics,
    TokenizerCount,
)
from stillgraph.exporter.validate.metrics import Divergence
from stillgraph.exporter.validate.table import Column, Comparison, markdown, overview, text_tables
from stillgraph.manifest import MANIFEST, read

Bundle = Callable[..., Path]


def column(name: str, kl: float, text: str = "prose.txt", fast: bool = False, greedy: bool = True) -> Column:
    """A column whose numbers tell it from others. kl: of its only position."""
    positions = [Divergence(kl=kl, top1_equal=True, nll=1.0, original_nll=1.0)]
    return Column(
        name=name,
        weights="portable",
        nbytes=123_456_789,
        passed=kl < 1,
        tokenizer=TokenizerCount(texts=Counted(equal=151, total=152), chats=None),
        kind=Kind(
            precision="int8",
            int8_prefill=fast,
            worst_error=kl / 10,
            texts=(
                TextStatistics(text=text, sha256=text, chunk=512, chunks=2, statistics=summarize(positions)),
            ),
            layers=tuple(LayerNoise(layer=i, keys=30.0 - i, values=20.0 + 9 * i) for i in range(4)),
            greedy=FirstDifferences(prompt=32, tokens=256, first=(None, 200, 3)) if greedy else None,
        ),
    )


def test_an_overview_has_each_number_in_its_place() -> None:
    rows = {row[0]: row[1:] for row in overview([column("a", 0.25), column("b", 2.0, greedy=False)])}
    assert rows == {
        "weights": ["portable"] * 2,
        "bundle, MB": ["123.5"] * 2,
        "validation": ["passed", "FAILED"],
        "worst relative error at the edges": ["2.5e-02", "2.0e-01"],
        "equal tokenizations": ["151 of 152"] * 2,
        "equal continuations of 256 tokens, of 3": ["1", ""],
        "first different token, median": ["200", ""],
        "first different token, 0 to 63": ["1", ""],
        "first different token, 64 to 127": ["0", ""],
        "first different token, 128 to 191": ["0", ""],
        "first different token, 192 to 255": ["1", ""],
        "layer by noise: worst": ["0 (values, 20.0 dB)"] * 2,
        "layer by noise: second": ["3 (keys, 27.0 dB)"] * 2,
        "layer by noise: third": ["2 (keys, 28.0 dB)"] * 2,
    }


def test_a_text_has_a_table_over_the_columns_that_have_it() -> None:
    first, second = text_tables([column("a", 0.25), column("b", 2.0), column("c", 3.0, text="code.txt")])
    assert first[0] == "prose.txt, 1 positions: the second half of 2 x 512 tokens"
    kl = {row[0]: row[1:] for row in first[1]}["Maximum KLD"]
    assert kl == ["0.250000", "2.000000", ""]
    assert {row[0]: row[1:] for row in second[1]}["Maximum KLD"] == ["", "", "3.000000"]


def test_a_page_is_a_table_of_all_columns() -> None:
    columns = column("fp32", 0.25), column("int4, fast prefill", 2.0)
    page = markdown(
        Comparison(model="tiny", date="2020-01-01", cpu="a-cpu", tools={"torch": "2.13"}, columns=columns)
    )
    lines = page.splitlines()
    assert lines[:3] == ["# tiny", "", "2020-01-01, a-cpu; torch 2.13."]
    assert "|  | fp32 | int4, fast prefill |" in lines
    assert "| Maximum KLD | 0.250000 | 2.000000 |" in lines
    cells = [line.count("|") for line in lines if line.startswith("|")]
    assert set(cells) == {4}


def test_bundles_of_two_checkpoints_are_no_table(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tiny_bundle(target="onnxruntime", precision="int8")
    second, manifest = Path(shutil.copytree(first, tmp_path / "second")), read(first)
    source = manifest.source.model_copy(update={"checkpoint_sha256": "0" * 64})
    (second / MANIFEST).write_text(manifest.model_copy(update={"source": source}).to_json())
    assert cli.main(["validate", str(first), str(second), "--table", str(tmp_path / "table.md")]) == 2
    assert "bundles of different checkpoints were given with --table" in capsys.readouterr().err
