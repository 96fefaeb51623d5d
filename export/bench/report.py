"""What a benchmark found: the model of reports/bench.json, and the numbers that are derived from it.

Times are milliseconds, memory is MB (10^6 bytes), bandwidth is GB/s (10^9 bytes a second).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from stillgraph.exporter.validate.divergences import Statistics
from stillgraph.spec import Frozen

Phase = Literal["load", "first request", "request"]


class Setting(Frozen):
    """What is asked of every contender: the point of a sweep, and the only one where there is none.

    image: path of a picture in the prompt, whose image tokens are among its tokens.
    """

    prompt_tokens: PositiveInt = 128
    new_tokens: PositiveInt = 64
    ctx: PositiveInt = 1024
    threads: PositiveInt = 1
    image: str | None = None


class Run(Frozen):
    """One process: load, a first request that warms up, and the request that is counted.

    ttft_ms, first_ttft_ms: from the request to its first token, of the counted and of the first request.
    step_ms: each later step of the counted request. swap_ms: time within the counted request that went into
    loading graphs (`--unload-prefill`); it is in neither of the former. vision_ms: of ttft_ms, time from
    pixels to features; 0 without a picture. other_cores: cores that the rest of
    the machine used during the request.
    """

    turn: NonNegativeInt
    load_ms: float
    first_ttft_ms: float
    ttft_ms: float
    step_ms: tuple[float, ...]
    swap_ms: float = 0.0
    vision_ms: float = 0.0
    peak_rss_mb: float
    peak_pss_mb: float | None
    other_cores: float
    tokens: tuple[int, ...]

    @property
    def tpot_ms(self) -> float:
        """Mean time of the tokens after the first."""
        return statistics.fmean(self.step_ms)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of the whole request, its prompt included, over its time."""
        return 1e3 * len(self.tokens) / (self.ttft_ms + self.swap_ms + sum(self.step_ms))


class MemoryTrace(Frozen):
    """PSS of one uncounted run, sampled from outside: what holds memory, and when.

    samples: (ms since the process began, MB). marks: (ms, what begins there): load, first request, prefill,
    decode, swap.
    """

    samples: tuple[tuple[float, float], ...]
    marks: tuple[tuple[float, str], ...]


class Result(Frozen):
    """One contender at one setting. note: why it has no runs, or fewer than others; else None.

    weights_mb: bytes of its weights on disk. cache_mb: of its keys and values at `ctx`. read_mb: bytes of
    weights that a decode step reads. exact: computes in fp32 with the checkpoint's own weights, so that its
    tokens are to equal those of every other exact contender. quality: against PyTorch fp32, over
    `Report.texts`. None for what is not known.
    """

    name: str
    label: str
    setting: Setting
    exact: bool = False
    versions: dict[str, str] = Field(default_factory=dict)
    weights_mb: float | None = None
    cache_mb: float | None = None
    read_mb: float | None = None
    runs: tuple[Run, ...] = ()
    memory: MemoryTrace | None = None
    quality: Statistics | None = None
    note: str | None = None

    def values(self, measure: Callable[[Run], float | None]) -> list[float]:
        """A measure of every counted run that has it."""
        found = [measure(run) for run in self.runs]
        return [value for value in found if value is not None]

    def bandwidth(self) -> float | None:
        """GB/s at which a decode step reads its weights: read_mb over the median TPOT."""
        if self.read_mb is None or not self.runs:
            return None
        return self.read_mb / statistics.median(run.tpot_ms for run in self.runs)


class Spread(Frozen):
    """A measure over runs."""

    median: float
    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values."""
        if not values:
            return None
        return cls(
            median=statistics.median(values),
            mean=statistics.fmean(values),
            least=min(values),
            most=max(values),
        )


class Machine(Frozen):
    """Where it ran. bandwidth: GB/s that a short probe reads from memory with all its cores."""

    cpu: str
    cores: PositiveInt
    memory_gb: float
    system: str
    bandwidth: float


class Hotspot(Frozen):
    """Time of one part of a graph, of one run: an op type (`MatMulNBits`), or a layer (`layer 3`, `head`)."""

    name: str
    ms: float
    calls: PositiveInt


class Profile(Frozen):
    """Where a graph's time goes, from ONNX Runtime's profiler: mean over `runs` runs; total_ms with gaps."""

    graph: str
    runs: PositiveInt
    total_ms: float
    by_op: tuple[Hotspot, ...]
    by_layer: tuple[Hotspot, ...]


class Report(Frozen):
    """reports/bench.json. The first result is the bundle's own; `reference` names what ratios are over.

    texts: what quality was measured over, in a sentence; None where it was not.
    """

    date: str
    command: str
    model: str
    machine: Machine
    reference: str
    turns: PositiveInt
    results: tuple[Result, ...]
    texts: str | None = None
    profiles: tuple[Profile, ...] = ()

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def tpot_percentile(result: Result, share: float) -> float | None:
    """The step time that `share` of all steps of all runs stay within: the nearest-rank percentile."""
    steps = sorted(step for run in result.runs for step in run.step_ms)
    return steps[max(0, -(-int(share * 1000) * len(steps) // 1000) - 1)] if steps else None


def ratio(result: Result, reference: Result, measure: Callable[[Run], float | None]) -> float | None:
    """Median over the turns that both finished of this contender's measure over the reference's."""
    other = {run.turn: measure(run) for run in reference.runs}
    pairs = [(measure(run), other.get(run.turn)) for run in result.runs]
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs]
    return statistics.median(ratios) if ratios else None
