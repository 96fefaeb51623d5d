"""What `stillgraph inspect` shows, as tables in a terminal."""

from __future__ import annotations

from collections import Counter

from rich.markup import escape
from rich.table import Table

from stillgraph.exporter.bundle.inspection import Inspection, LayerCache
from stillgraph.exporter.compile.product_times import product_table
from stillgraph.manifest import Quantization, Validation

MB = 1e6
UNCOMPILED = "no; 'stillgraph compile' makes loading faster and memory smaller"


def tables(inspection: Inspection) -> list[Table]:
    """The same as readable text."""
    timed = [product_table(inspection.products)] if inspection.products else []
    others = _file_table(inspection), _op_table(inspection), _memory_table(inspection)
    return [_overview(inspection), *others, *timed]


def _overview(inspection: Inspection) -> Table:
    ranges = inspection.ranges
    table = Table(title=f"bundle {escape(inspection.bundle)}", show_header=False)
    prompt = "no prefill graph"
    if ranges.max_len is not None:
        chunks = f"longer ones in chunks, {ranges.ctx} in all" if ranges.continues_cache else "not more"
        prompt = f"1 to {ranges.max_len} tokens a call; {chunks}"
    if _grows(inspection):
        prompt = f"1 to {ranges.ctx} tokens at once"
    rows = {
        "model": f"{inspection.model} ({inspection.architecture})",
        "checkpoint": inspection.checkpoint_sha256,
        "target, precision": f"{inspection.target}, {inspection.precision}{_form(inspection.quantization)}",
        "compiled": inspection.compiled or ("no" if _grows(inspection) else UNCOMPILED),
        "made with": ", ".join(f"{name} {version}" for name, version in inspection.tools.items()),
        "token ids": f"0 to {ranges.vocabulary - 1}",
        "rows (batch)": f"{ranges.batch}",
        "prompt": prompt,
        "context": f"{ranges.ctx} tokens" if ranges.ctx else "no cache is read",
        "last validation": _verdict(inspection.validation),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _grows(inspection: Inspection) -> bool:
    return any(graph.shape.grows for graph in inspection.graphs.values())


def _form(quantization: Quantization | None) -> str:
    if quantization is None:
        return ""
    kind = f"{'' if quantization.symmetric else 'a'}symmetric"
    kept = "".join(f", {pattern} kept at {value}" for pattern, value in quantization.keep.items())
    kept += f", {len(quantization.better)} weights at more bits" if quantization.better else ""
    kept += ", calibrated" if quantization.calibration else ""
    kept += ", a prefill with int8 weights of its own" if quantization.fast_prefill else ""
    kept += f" but for {len(quantization.blocked)}" if quantization.blocked else ""
    return f" in {kind} blocks of {quantization.block_size}{kept}"


def _verdict(validation: Validation | None) -> str:
    if validation is None:
        return "none; run 'stillgraph validate'"
    word = "passed" if validation.passed else "FAILED"
    error = (
        f"relative error of logits {validation.max_relative_error:.1e},"
        f" worst error {validation.worst_ratio:.2g} of its bound"
    )
    cases = f"{validation.cases} cases, top-1 agreement {validation.top1_agreement:.1%}"
    quality = validation.quality
    cost = f"; against the checkpoint's own weights KL {quality.kl:.1e} nats" if quality else ""
    return f"{word} on {validation.date}: {error}, {cases}{cost}"


def _file_table(inspection: Inspection) -> Table:
    table = Table("file", "bytes", title="files")
    table.columns[1].justify = "right"
    for name, nbytes in inspection.files.items():
        table.add_row(escape(name), f"{nbytes:,}")
    return table


def _op_table(inspection: Inspection) -> Table:
    graphs = inspection.graphs
    table = Table("op", *(escape(name) for name in graphs), title="ops")
    for column in table.columns[1:]:
        column.justify = "right"
    totals = sum((Counter(graph.ops) for graph in graphs.values()), Counter[str]())
    for op, _ in totals.most_common():
        table.add_row(op, *(str(graph.ops.get(op, 0)) for graph in graphs.values()))
    table.add_section()
    table.add_row("all", *(str(graph.nodes) for graph in graphs.values()))
    return table


def _memory_table(inspection: Inspection) -> Table:
    memory = inspection.memory
    table = Table("what", "MB", "of which", title="memory")
    table.columns[1].justify = "right"
    table.add_row("weights", f"{memory.weights / MB:,.2f}", "in one file, mapped")
    held = "one set, when the context is full" if _grows(inspection) else "one set of buffers"
    table.add_row("cache", f"{memory.cache / MB:,.2f}", f"keys and values of every layer, {held}")
    for layer, indices in _alike(memory.layers).items():
        sees = f"window {layer.window}" if layer.window else "sees all"
        what = f"  {'each of' if len(indices) > 1 else 'of'} {len(indices)} {layer.kind}"
        layers = ", ".join(map(str, indices))
        held = f"{layer.capacity} slots of {layer.kv_heads} x {layer.head_dim}"
        if layer.kv_from is not None:
            held = f"those of layer {layer.kv_from}"
        table.add_row(what, f"{layer.nbytes / MB:,.2f}", f"{held}, {sees}; layers {layers}")
    for name, graph in inspection.graphs.items():
        if (largest := graph.largest_activation) is not None:
            made = f"{largest.op} {largest.dtype} {list(largest.shape)}"
            table.add_row(f"largest of {name}", f"{largest.nbytes / MB:,.2f}", escape(made))
    return table


def _alike(layers: tuple[LayerCache, ...]) -> dict[LayerCache, list[int]]:
    groups: dict[LayerCache, list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(layer, []).append(index)
    return groups
