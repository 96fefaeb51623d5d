"""A benchmark report such as a machine of two cores gives, made of fixed numbers."""

from __future__ import annotations

import math
from typing import Any

from stillgraph.exporter.bench.report import (
    Hotspot,
    Machine,
    MemoryTrace,
    Profile,
    Report,
    Result,
    Run,
    Setting,
)

COLUMNS = [
    "contender",
    "TTFT ms",
    "TPOT ms",
    "TPOT mean",
    "TPOT p95",
    "tokens/s",
    "load ms",
    "first request ms",
    "peak PSS MB",
    "peak RSS MB",
    "weights MB",
    "cache MB",
    "GB/s",
    "TTFT ratio",
    "TPOT ratio",
    "PSS ratio",
    "equal tokens",
    "note",
]
KINDS = [  # name, label, TTFT, TPOT, load, PSS, weights
    ("stillgraph", "Stillgraph int4", 514.0, 18.1, 430.0, 812.0, 690.0),
    ("llama-q4_0", "llama.cpp Q4_0", 715.0, 21.4, 610.0, 1260.0, 720.0),
    ("genai", "onnxruntime-genai int4", 640.0, 24.9, 1900.0, 1730.0, 905.0),
    ("openvino", "OpenVINO int4 (optimum)", 583.0, 22.6, 3100.0, 1540.0, 760.0),
    ("torch", "PyTorch bfloat16, compiled", 1480.0, 88.0, 5200.0, 2600.0, 2000.0),
]


def run(turn: int, kind: tuple[Any, ...], tokens: int = 64, pss: bool = True, scale: float = 1.0) -> Run:
    _, _, ttft, tpot, load, peak, _ = kind
    wobble = 1 + 0.03 * math.sin(7.1 * turn + len(kind[0]))
    steps = tuple(
        tpot * wobble * (1 + 0.0015 * n + 0.05 * math.sin(2.7 * n + turn)) for n in range(tokens - 1)
    )
    return Run(
        turn=turn,
        load_ms=load * wobble,
        first_ttft_ms=1.3 * ttft,
        ttft_ms=ttft * wobble * scale,
        step_ms=steps,
        peak_rss_mb=1.1 * peak,
        peak_pss_mb=peak * wobble if pss else None,
        other_cores=0.1,
        tokens=tuple(range(tokens)),
    )


def memory(kind: tuple[Any, ...]) -> MemoryTrace:
    _, _, ttft, tpot, load, peak, _ = kind
    request = [load + 1.3 * ttft + 8 * tpot, load + 2.3 * ttft + 8 * tpot]
    end = request[1] + 63 * tpot
    grow = [(end * n / 80, min(1.0, 0.1 + end * n / 80 / (load + ttft))) for n in range(81)]
    return MemoryTrace(
        samples=tuple((ms, peak * share) for ms, share in grow),
        marks=(
            (0.0, "load"),
            (load, "first request"),
            (request[0], "prefill"),
            (request[1] - 60, "swap"),
            (request[1], "decode"),
        ),
    )


def result(kind: tuple[Any, ...], setting: Setting, turns: int = 5, **changes: Any) -> Result:
    scale = setting.prompt_tokens / 128
    runs = tuple(run(turn, kind, setting.new_tokens, scale=scale) for turn in range(turns))
    values: dict[str, Any] = {
        "name": kind[0],
        "label": kind[1],
        "setting": setting,
        "weights_mb": kind[6],
        "cache_mb": 27.3,
        "read_mb": kind[6],
        "runs": runs,
        "memory": memory(kind),
        "versions": {"engine": "1.32.0"},
    }
    return Result(**(values | changes))


def report_of(*results: Result, **changes: Any) -> Report:
    machine = Machine(cpu="Intel Xeon 8481C", cores=2, memory_gb=15.6, system="Linux 6.1", bandwidth=41.0)
    values: dict[str, Any] = {
        "date": "2026-11-24",
        "command": "stillgraph bench artifacts/gemma --against all",
        "model": "google/gemma-3-1b-it",
        "machine": machine,
        "reference": "llama-q4_0",
        "turns": 5,
        "results": results,
    }
    return Report(**(values | changes))


def full() -> Report:
    """Five contenders, one that failed, a sweep over the prompt, and a profile of two graphs."""
    failed = Result(
        name="mlc", label="MLC LLM", setting=Setting(), note="no wheel for Python 3.11; pip install mlc"
    )
    sweep = [result(kind, Setting(prompt_tokens=n), memory=None) for n in (32, 512) for kind in KINDS[:2]]
    ops = (
        "MatMulNBits GroupQueryAttention SkipLayerNorm RotaryEmbedding Gather Mul Gelu Add Cast Slice Reshape"
    )
    by_op = tuple(Hotspot(name=n, ms=14 / (k + 1) ** 2, calls=26) for k, n in enumerate(ops.split()))
    layers = [f"layer {n}" for n in range(26)] + ["embedding", "head"]
    by_layer = tuple(Hotspot(name=n, ms=0.6 if n != "head" else 2.5, calls=20) for n in layers)
    profiles = [
        Profile(graph=g, runs=8, total_ms=18.4, by_op=by_op, by_layer=by_layer) for g in ("prefill", "decode")
    ]
    bars = [result(kind, Setting()) for kind in KINDS]
    return report_of(*bars, failed, *sweep, profiles=tuple(profiles))


def rows(report: Report) -> list[list[str]]:
    """A table as plain text, one row a result."""
    middle = [f"{11.1 * n:,.1f}" for n in range(1, len(COLUMNS) - 1)]
    return [[one.label, *middle, one.note or ""] for one in report.results]
