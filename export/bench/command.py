"""`stillgraph bench`."""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stillgraph.cpu import available_cores
from stillgraph.errors import CheckFailed, StillgraphError
from stillgraph.exporter.bench.contender import ContenderSource
from stillgraph.exporter.bench.interleave import Entry, check, ids_of, measure, prepare, sweep
from stillgraph.exporter.bench.lineup import Subject, lineup, open_subject
from stillgraph.exporter.bench.report import Machine, Profile, Report, Result, Setting, ratio
from stillgraph.exporter.bench.table import (
    against,
    brief,
    brief_columns,
    by_setting,
    cells,
    columns,
    disagreements,
    markdown,
    told,
)

if TYPE_CHECKING:
    from stillgraph.exporter.bench.quality import Scoring

log = logging.getLogger("stillgraph")
REFERENCES = ("torch", "dynamic")  # of --against; the first of them that ran is what ratios are over
WORK = Path("artifacts/bench")
Extent = Literal["none", "quick", "default", "full"]
FILE_WIDTH = 200  # of tables where stdout is no terminal


def bench(
    bundle: Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)],
    against_: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Contenders by name, comma between, may be repeated: torch, torch-bf16, dynamic, portable, "
            "onnxruntime-int4, ...; +compiled or +unload behind; llama, genai, openvino; a bundle's folder; "
            "a GGUF file; or all. Default: torch,dynamic.",
            show_default=False,
        ),
    ] = None,
    sweep_: Annotated[
        str | None, typer.Option("--sweep", help="prompt=16,128,512 or new=, ctx=, threads=, precision=.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Random ids, the same for everyone.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to make, greedily.", min=1)] = 64,
    threads: Annotated[
        int | None, typer.Option(help="Default: every core this process may use.", min=1)
    ] = None,
    turns: Annotated[int, typer.Option(help="Counted runs of each, after one that is not.", min=1)] = 10,
    quality: Annotated[
        Extent, typer.Option(help="How much text for KL divergence from PyTorch fp32, as in validation.")
    ] = "quick",
    text: Annotated[
        list[Path] | None, typer.Option(help="A text of your own to measure that over, may be repeated.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture in the prompt, of a model that sees; its tokens count.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the bundle's time goes.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The checkpoint, where it is not where it was.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Where contenders' models and environments are kept.")] = WORK,
    out: Annotated[Path | None, typer.Option(help="Where reports go. Default: BUNDLE/reports.")] = None,
    patience: Annotated[float, typer.Option(help="Seconds to wait for a quiet machine before a run.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compare a bundle with others of the same checkpoint: time, memory and tokens.

    Every contender runs in a process of its own, in turns, with the same ids, threads and number of tokens.
    Ratios are to PyTorch, taken within a turn. bench.json is written after each run, so that a run that is
    stopped leaves its rows; bench.md and bench.html at the end.
    """
    subject = open_subject(bundle)
    base = Setting(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        ctx=subject.ctx,
        threads=threads or available_cores(),
        image=str(image.resolve()) if image else None,
    )
    words = ",".join(REFERENCES if against_ is None else against_).split(",")
    names = [word.strip() for word in words if word.strip()]
    entries = _entries(subject, base, names, sweep_, work, model)
    scoring = _scoring(subject, subject.source(work, model, base.ctx), text or (), quality)
    console = Console(stderr=True, quiet=quiet, highlight=False)
    console.print(f"probing memory of {bundle}", markup=False)
    bench_run = Bench(subject, entries, turns, out or bundle / "reports", machine(base.threads), scoring)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ran so far is still written
    try:
        bench_run.run(patience, console)
        if profile:
            bench_run.profiles = _profiles(bundle, subject, base)
    finally:
        report = bench_run.finish()
        _tell(report, bench_run.out, as_json)
    if names := disagreements(report):
        problem = f"{', '.join(names)} made other tokens than those of the same numbers"
        raise CheckFailed("bench", problem, f"see same tokens in {bench_run.out / 'bench.html'}")


@dataclass
class Bench:
    """One benchmark in progress, and its report so far."""

    subject: Subject
    entries: list[Entry]
    turns: int
    out: Path
    machine: Machine
    scoring: Scoring | None = None
    profiles: tuple[Profile, ...] = ()
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    def run(self, patience: float, console: Console) -> None:
        def say(text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        self.out.mkdir(parents=True, exist_ok=True)
        prepare(self.entries, say)
        measure(self.entries, self.subject.manifest.model, self.turns, patience, say, self.save)
        if self.scoring is not None:
            self.scoring.score(self.entries, say)

    def report(self) -> Report:
        results = tuple(entry.result() for entry in self.entries)
        ran = [result.name for result in results if result.runs]
        return Report(
            date=self.date,
            command=shlex.join(["stillgraph", *sys.argv[1:]]),
            model=f"{self.subject.manifest.source.id} ({self.subject.manifest.model.architecture})",
            machine=self.machine,
            reference=next((name for name in REFERENCES if name in ran), results[0].name),
            turns=self.turns,
            results=results,
            texts=self.scoring.told() if self.scoring and any(r.quality for r in results) else None,
            profiles=self.profiles,
        )

    def save(self) -> Report:
        """bench.json, whole at any time."""
        report, path = self.report(), self.out / "bench.json"
        beside = path.with_suffix(".json.new")
        beside.write_text(report.to_json(), encoding="utf-8")
        beside.replace(path)
        return report

    def finish(self) -> Report:
        """All reports of what has run."""
        self.out.mkdir(parents=True, exist_ok=True)
        report = self.save()
        (self.out / "bench.md").write_text(markdown(report), encoding="utf-8")
        try:
            from stillgraph.exporter.bench.page import page

            html = page(report, columns(report), [cells(result, report) for result in report.results])
        except StillgraphError as error:  # matplotlib is an extra
            log.warning(str(error))
        else:
            (self.out / "bench.html").write_text(html, encoding="utf-8")
        return report


def _entries(
    subject: Subject, base: Setting, names: Sequence[str], option: str | None, work: Path, model: str | None
) -> list[Entry]:
    settings, names = [base], list(names)
    if option and option.startswith("precision="):
        target = subject.manifest.target
        precisions = option.partition("=")[2].split(",")
        names += [target if precision == "fp32" else f"{target}-{precision}" for precision in precisions]
    elif option:
        settings = sweep(option, base)
    entries = []
    for setting in settings:
        check(setting, subject.manifest.model.vision)
        contenders = lineup(subject, subject.source(work, model, setting.ctx), names)
        entries += [Entry(contender, setting) for contender in contenders]
    return entries


def _scoring(
    subject: Subject, source: ContenderSource, texts: Sequence[Path], extent: Extent
) -> Scoring | None:
    """What to measure quality over. Raises StillgraphError for a text that cannot be read."""
    if extent == "none":
        return None
    from stillgraph.exporter.bench.quality import scoring_of  # ONNX Runtime comes with it

    return scoring_of(subject, source, texts, extent)


def machine(threads: int) -> Machine:
    """This machine, and the bandwidth that a probe of a second finds."""
    from stillgraph.exporter.bench.bandwidth import read_bandwidth

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return Machine(
        cpu=name or platform.processor() or platform.machine(),
        cores=available_cores(),
        memory_gb=pages / 1e9,
        system=platform.platform(),
        bandwidth=read_bandwidth(threads),
    )


def _profiles(bundle: Path, subject: Subject, setting: Setting) -> tuple[Profile, ...]:
    from stillgraph.exporter.bench.op_profile import profiles

    ids = ids_of(setting.model_copy(update={"image": None}), subject.manifest.model)
    return profiles(bundle, ids, setting.new_tokens, setting.threads)


def _tell(report: Report, out: Path, as_json: bool) -> None:
    if as_json:
        rows = [_row(result, report) for result in report.results]
        print(json.dumps({"report": str(out / "bench.json"), "reference": report.reference, "results": rows}))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for setting, results in by_setting(report).items():
        table = Table(*brief_columns(report), title=told(setting), title_justify="left")
        for result in results:
            table.add_row(*map(escape, brief(result, report)))
        console.print(table)
    for profile in report.profiles:
        from stillgraph.exporter.bench.op_profile import hotspot_table

        console.print(hotspot_table(profile), markup=False)
    console.print(f"{out / 'bench.html'}, bench.md, bench.json", markup=False)


def _row(result: Result, report: Report) -> dict[str, Any]:
    """Medians over the counted runs, and ratios to the reference."""
    reference = against(result, report)
    row: dict[str, Any] = {"name": result.name, **result.setting.model_dump(), "runs": len(result.runs)}
    for name in ("ttft_ms", "tpot_ms", "load_ms", "peak_pss_mb", "peak_rss_mb"):
        values = sorted(result.values(lambda run, name=name: getattr(run, name)))  # type: ignore[misc]
        row[name] = round(values[len(values) // 2], 3) if values else None
    for name in ("ttft_ms", "tpot_ms", "peak_pss_mb"):
        found = reference and ratio(result, reference, lambda run, name=name: getattr(run, name))  # type: ignore[misc]
        row[name.partition("_m")[0] + "_ratio"] = round(found, 4) if found else None
    return row | {"note": result.note}
