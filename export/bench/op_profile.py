"""Where the time of a bundle's graphs goes: by op type and by layer, from ONNX Runtime's profiler."""

from __future__ import annotations

import gc
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.bench.report import Hotspot, Profile
from stillgraph.loading import load

STAGE = "profile"
WARM_UP = 2  # decode steps of the request that is not counted
PREFILLS = 3  # counted
SHOWN = 15
BETWEEN = "between nodes"
KERNEL = "_kernel_time"
# What the exporter puts before the slash of a node's name. Another node, such as one that ONNX Runtime adds,
# or one that makes a mask for several layers, is in "other".
PLACES = {"embed_tokens": "embedding", "norm": "head", "lm_head": "head"}


@dataclass(frozen=True)
class Kernel:
    """One call of a node."""

    name: str
    op: str
    ms: float


@dataclass(frozen=True)
class Execution:
    """One run of a graph: its time, and its nodes in the order in which they ran."""

    ms: float
    kernels: tuple[Kernel, ...]


def profiles(bundle: Path, ids: Sequence[int], new_tokens: int, threads: int) -> tuple[Profile, Profile]:
    """Where prefill and decode spend their time: of a prompt, and of the steps to `new_tokens` greedy tokens.

    Runs the graphs that `load` chooses, with its options. The prompt is computed three times, after a request
    that is not counted; each chunk of it is a run. The profiler itself takes some microseconds a node, most
    of them between nodes. Raises StillgraphError for what the bundle cannot take.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefills, decodes = _run(bundle, ids, new_tokens, threads, folder)
        found = [
            _profile(role, _executions(folder, role)[-counted:], counted)
            for role, counted in (("prefill", prefills), ("decode", decodes))
        ]
    return found[0], found[1]


def _run(bundle: Path, ids: Sequence[int], new_tokens: int, threads: int, folder: Path) -> tuple[int, int]:
    """Leave a trace of each graph in `folder`; how many of their last runs count."""
    engine = load(bundle, unload_prefill=False, threads=threads, profile=folder)
    if engine.manifest.graph("prefill") is None:
        problem = f"{bundle} has one growing graph, and no prefill and decode to tell apart"
        raise StillgraphError(STAGE, problem, "profile a static bundle")
    graphs, prompt = engine.graphs, engine.ids(ids)
    steps = new_tokens - 1  # the first token is the prefill's
    if steps < 1:
        raise StillgraphError(STAGE, f"{new_tokens} new tokens have no decode step", "ask for 2 or more")
    if len(prompt) + steps > graphs.ctx:
        problem = f"{len(prompt)} + {new_tokens} tokens do not fit a cache of {graphs.ctx}"
        raise StillgraphError(STAGE, problem, "ask for fewer, or export with a larger --ctx")
    for prefills, decodes in ((1, min(WARM_UP, steps)), (PREFILLS, steps)):
        for _ in range(prefills):
            engine.reset()
            logits = graphs.prefill([prompt] * graphs.rows)
        for _ in range(decodes):
            logits = graphs.decode(logits.argmax(axis=1).tolist())
    chunks = -(-len(prompt) // graphs.max_len)
    del engine, graphs, logits
    gc.collect()  # a session writes the end of its trace when it goes
    return PREFILLS * chunks, steps


def _executions(folder: Path, role: str) -> list[Execution]:
    """Every run in a graph's trace, in order."""
    (path,) = folder.glob(f"{role}_*.json")
    return list(_split(json.loads(path.read_text(encoding="utf-8"))))


def _split(events: Sequence[dict[str, Any]]) -> Iterator[Execution]:
    """Runs out of events; a trace has an event where it ends, so that a run is behind its nodes."""
    kernels: list[Kernel] = []
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(KERNEL):
            name, op = event["name"].removesuffix(KERNEL), event["args"]["op_name"]
            kernels.append(Kernel(name, op, event["dur"] / 1e3))
        elif event["name"] == "model_run":
            yield Execution(event["dur"] / 1e3, tuple(kernels))
            kernels = []


def _profile(role: str, runs: Sequence[Execution], expected: int) -> Profile:
    """The mean of runs, which all have the same nodes: the graph has no control flow."""
    if len(runs) != expected or len({len(run.kernels) for run in runs}) != 1:
        problem = f"ONNX Runtime's trace of {role} lacks runs or nodes"
        raise CheckFailed(STAGE, problem, "ask for fewer tokens, the trace has room for a million nodes")
    total = sum(run.ms for run in runs) / len(runs)
    kernels = [kernel for run in runs for kernel in run.kernels]
    by_op = _sums([(kernel.op, kernel.ms) for kernel in kernels], len(runs), total)
    by_layer = _sums([(layer_of(kernel.name), kernel.ms) for kernel in kernels], len(runs), total)
    return Profile(
        graph=role,
        runs=len(runs),
        total_ms=total,
        by_op=tuple(sorted(by_op, key=lambda spot: -spot.ms)),
        by_layer=tuple(sorted(by_layer, key=lambda spot: _order(spot.name))),
    )


def _sums(times: Sequence[tuple[str, float]], runs: int, total: float) -> list[Hotspot]:
    """By name, of one run; what is left of `total` is between nodes."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, ms in times:
        groups[name].append(ms)
    spots = [
        Hotspot(name=name, ms=sum(group) / runs, calls=len(group) // runs) for name, group in groups.items()
    ]
    left = max(0.0, total - sum(spot.ms for spot in spots))
    return [*spots, Hotspot(name=BETWEEN, ms=left, calls=1)]


def layer_of(node: str) -> str:
    """The part of the model that a node's name puts it in: `embedding`, `layer 3`, `head` or `other`."""
    module, slash, _ = node.partition("/")
    if not slash:
        return "other"
    head, *rest = module.split(".")
    if head == "layers" and rest and rest[0].isdecimal():
        return f"layer {rest[0]}"
    return PLACES.get(module, "other")


def _order(name: str) -> tuple[int, int]:
    """Sorts parts as the model runs them, what is of no part at the end."""
    kind, _, number = name.partition(" ")
    ranks = ("embedding", "layer", "head", "other", "between")
    return ranks.index(kind), int(number) if number.isdecimal() else 0


def hotspot_table(profile: Profile) -> str:
    """Markdown: op types by their time, and parts of the model; what is behind the longest 15 is one row."""
    title = f"{profile.graph}: {profile.total_ms:.2f} ms a run, mean of {profile.runs}"
    tables = (
        _table(heading, spots, profile.total_ms)
        for heading, spots in (("op", profile.by_op), ("part", profile.by_layer))
    )
    return "\n\n".join((title, *tables)) + "\n"


def _table(heading: str, spots: Sequence[Hotspot], total: float) -> str:
    longest = sorted(spots, key=lambda spot: -spot.ms)[:SHOWN]
    rest = [spot for spot in spots if spot not in longest]
    rows = [(spot.name, spot.ms, spot.calls) for spot in spots if spot in longest]
    if rest:
        rows.append((f"{len(rest)} more", sum(spot.ms for spot in rest), sum(spot.calls for spot in rest)))
    lines = [f"| {heading} | ms | share | calls |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {ms:.3f} | {ms / total:.1%} | {calls} |" for name, ms, calls in rows]
    return "\n".join(lines)
