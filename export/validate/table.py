"""The table for a deployer: kinds of graphs side by side, of one bundle or of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from stillgraph.exporter.staging import staged_file
from stillgraph.exporter.validate.kinds import Kind, LayerNoise, TextStatistics, TokenizerCount
from stillgraph.exporter.validate.report import Parity
from stillgraph.manifest import Manifest
from stillgraph.spec import Frozen

WORST_LAYERS = 3
Rows = list[list[str]]  # the first cell is what a row is of


class Column(Frozen):
    """One kind of graphs. weights: how they are stored; nbytes: of all files of its bundle."""

    name: str
    weights: str
    nbytes: int
    passed: bool
    tokenizer: TokenizerCount | None
    kind: Kind


class Comparison(Frozen):
    """Columns of several bundles of one checkpoint, and where they were measured."""

    model: str
    date: str
    cpu: str
    tools: dict[str, str]
    columns: tuple[Column, ...]


def columns_of(manifest: Manifest, parity: Parity) -> list[Column]:
    """A column for each kind of graphs in a bundle."""
    form, weights = manifest.quantization, f"{manifest.target}"
    if form is not None:
        weights += f", blocks of {form.block_size}" + ("" if form.symmetric else ", zero points")
        weights += "".join(f", {pattern}={precision}" for pattern, precision in form.keep.items())
    if manifest.kept_fp32:
        weights += f", {len(manifest.kept_fp32)} products in fp32"
    nbytes = sum(file.nbytes for file in manifest.all_files())
    return [
        Column(name=kind.name, weights=weights, nbytes=nbytes, passed=parity.passed, kind=kind,
               tokenizer=parity.tokenizer)
        for kind in parity.kinds
    ]  # fmt: skip


def compare_bundles(measured: Sequence[tuple[Manifest, Parity]]) -> Comparison:
    """All kinds of graphs of several bundles of one checkpoint."""
    manifest, parity = measured[0]
    return Comparison(
        model=Path(manifest.source.id).name,
        date=parity.date,
        cpu=parity.cpu,
        tools=parity.tools,
        columns=tuple(column for pair in measured for column in columns_of(*pair)),
    )


def overview(columns: Sequence[Column]) -> Rows:
    """All but the statistics of texts; a row that no column has a value for is left out."""
    kinds = [column.kind for column in columns]
    rows = [
        ["weights", *(column.weights for column in columns)],
        ["bundle, MB", *(f"{column.nbytes / 1e6:.1f}" for column in columns)],
        ["validation", *("passed" if column.passed else "FAILED" for column in columns)],
        ["worst relative error at the edges", *(_exponent(kind.worst_error) for kind in kinds)],
        ["worst relative error of picture features", *(_exponent(kind.feature_error) for kind in kinds)],
        ["equal tokenizations", *(f"{c.tokenizer.texts}" if c.tokenizer else "" for c in columns)],
        ["equal chats", *(f"{c.tokenizer.chats or ''}" if c.tokenizer else "" for c in columns)],
        ["largest magnitude in fp16, of 65504", *(_exponent(kind.largest_fp16) for kind in kinds)],
        *_greedy(kinds),
        *([f"layer by noise: {_ordinal(index)}", *(_layer(kind.noisiest, index) for kind in kinds)]
          for index in range(WORST_LAYERS)),
    ]  # fmt: skip
    return [row for row in rows if any(row[1:])]


def _greedy(kinds: Sequence[Kind]) -> Iterable[list[str]]:
    """The rows of greedy continuations: those equal to the end, the median, and a histogram."""
    known = next((kind.greedy for kind in kinds if kind.greedy), None)
    if known is None:
        return
    found = [kind.greedy for kind in kinds]
    count, tokens = len(known.first), known.tokens
    yield [f"equal continuations of {tokens} tokens, of {count}", *(f"{g.equal}" if g else "" for g in found)]
    yield ["first different token, median", *(f"{g.median:g}" if g else "" for g in found)]
    for index, (low, high, _) in enumerate(known.histogram()):
        cells = [f"{g.histogram()[index][2]}" if g else "" for g in found]
        yield [f"first different token, {low} to {high}", *cells]


def text_tables(columns: Sequence[Column]) -> list[tuple[str, Rows]]:
    """A title and llama.cpp's lines for each text that a column was measured over."""
    texts = {text.sha256: text for column in columns for text in column.kind.texts}
    found = list[tuple[str, Rows]]()
    for sha256, text in texts.items():
        own = [next((t for t in column.kind.texts if t.sha256 == sha256), None) for column in columns]
        lines = [dict(one.statistics.lines()) if one else {} for one in own]
        names = list(dict(text.statistics.lines()))
        found.append((text_title(text), [[name, *(line.get(name, "") for line in lines)] for name in names]))
    return found


def text_title(text: TextStatistics) -> str:
    counted = f"{text.statistics.positions} positions: the second half of {text.chunks} x {text.chunk} tokens"
    return f"{text.text or 'random ids'}, {counted}"


def all_tables(manifest: Manifest, parity: Parity) -> list[Table]:
    """For a terminal: those of the report, and its kinds of graphs side by side."""
    columns, found = columns_of(manifest, parity), parity.tables()
    titled = [("graphs as they run", overview(columns)), *text_tables(columns)]
    for title, rows in titled:
        table = Table("", title=title)
        for column in columns:
            table.add_column(column.name, justify="right")
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def markdown(comparison: Comparison) -> str:
    """The comparison as a page of Markdown."""
    tools = ", ".join(f"{name} {version}" for name, version in comparison.tools.items())
    lines = [f"# {comparison.model}", "", f"{comparison.date}, {comparison.cpu}; {tools}.", "", NOTES, ""]
    lines += _markdown_table(comparison.columns, overview(comparison.columns))
    for title, rows in text_tables(comparison.columns):
        lines += ["", f"## {title}", "", *_markdown_table(comparison.columns, rows)]
    return "\n".join(lines) + "\n"


def write_table(path: Path, measured: Sequence[tuple[Manifest, Parity]]) -> None:
    """All bundles side by side, as JSON where the file's name says so, else as Markdown."""
    comparison = compare_bundles(measured)
    json = path.suffix == ".json"
    staged_file(path, comparison.model_dump_json(indent=1) + "\n" if json else markdown(comparison))


NOTES = """\
Errors at the edges are of the graph alone, against PyTorch in fp32 with the same weights. All else is of the
graphs as they run, against PyTorch in fp32 with the checkpoint's own weights. Statistics have the names and
formulas of `llama-perplexity --kl-divergence`: KL in nats, standard errors as if positions were independent.
Noise is 10 log10 of signal power over noise power of a layer's keys or values, whichever is worse."""


def _markdown_table(columns: Sequence[Column], rows: Rows) -> list[str]:
    head = ["", *(column.name for column in columns)]
    rule = ["---", *("---:" for _ in columns)]
    return [f"| {' | '.join(row)} |" for row in [head, rule, *rows]]


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _layer(layers: Sequence[LayerNoise], index: int) -> str:
    if index >= len(layers):
        return ""
    layer = layers[index]
    what = "keys" if layer.keys <= layer.values else "values"
    return f"{layer.layer} ({what}, {layer.worst:.1f} dB)"


def _ordinal(index: int) -> str:
    return ("worst", "second", "third")[index]
