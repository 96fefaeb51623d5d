"""`stillgraph run`, `stillgraph chat` and `stillgraph unpack`.

ONNX Runtime is imported inside them, so that help and wrong use are told at once.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from stillgraph.errors import StillgraphError
from stillgraph.files import check_files
from stillgraph.manifest import read
from stillgraph.metrics import PeakPss, Times, peak_rss_mb
from stillgraph.options import MAX_NEW_TOKENS, Options
from stillgraph.sampling import Sampling

if TYPE_CHECKING:
    from stillgraph.conversation import Conversation
    from stillgraph.engine import Engine
    from stillgraph.row import Step

Bundle = Annotated[Path, typer.Argument(help="Folder made by 'stillgraph export'.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the most likely tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the most likely tokens of this total probability.")
]
MinP = Annotated[float | None, typer.Option(help="Drop what is less likely than this share of the best.")]
Penalty = Annotated[
    float | None, typer.Option(help="Over 1 makes tokens that were there before less likely.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed, the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")]
Images = Annotated[
    list[Path] | None,
    typer.Option(help="A picture; again for each mark of one in the prompt, which a chat need not have."),
]
Threads = Annotated[int | None, typer.Option(help="Default: every core this process may use.")]
CheckHashes = Annotated[
    bool, typer.Option("--check-hashes", help="Compare every file's SHA-256, not only its page sums.")
]
Backend = Annotated[str, typer.Option(help="onnxruntime, or openvino for a portable bundle.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Unload = Annotated[
    bool | None,
    typer.Option(
        "--unload-prefill/--keep-prefill",
        help="Hold one graph in memory at a time; also UNLOAD_PREFILL_BEFORE_DECODE=1 in the environment.",
        show_default=False,
    ),
]
SHOW = "/image "


def run(
    bundle: Bundle,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Text; - reads stdin.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="A text file, less its last newline; - is stdin.")
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help="Ids as they are, such as 2,17,5.")] = None,
    image: Images = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message in a chat.")] = False,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    unload_prefill: Unload = None,
    threads: Threads = None,
    check_hashes: CheckHashes = False,
    backend: Backend = "onnxruntime",
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the text.")] = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt. The text goes to stdout as it comes, a summary to stderr.

    TTFT is from the request to the first token, TPOT the mean time of the tokens after it. Loading counts in
    neither: load_ms is all of it, with --unload-prefill also the change of graphs after the first token.
    """
    given = _read_prompt(prompt, prompt_file, token_ids, chat)
    options = _options(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, image or []
    )
    with PeakPss() as peak:
        engine = _load(
            bundle, quiet, threads, unload_prefill=unload_prefill, check_hashes=check_hashes, backend=backend
        )
        peak.sample()
        if isinstance(given, str) and chat:
            given = engine.ids([engine.prompts.user(given, len(options["images"]))])
        ids = engine.ids(given)
        steps: list[Step] = []
        for step in engine.stream(ids, **options):
            steps.append(step)
            if not as_json:
                _show(step.text)
    report = _report(engine, len(ids), steps, peak.mb)
    _show(json.dumps(report) + "\n" if as_json else "\n")
    if not quiet and not as_json:
        _summary(report)


def chat(
    bundle: Bundle,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    unload_prefill: Unload = None,
    threads: Threads = None,
    check_hashes: CheckHashes = False,
    backend: Backend = "onnxruntime",
    quiet: Quiet = False,
) -> None:
    """Chat, a line a turn. /image PATH shows a picture; /reset begins again; /exit ends, as does the input.

    Each turn continues the cache of the turn before, where the bundle's prefill can.
    """
    options = _options(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, [])
    engine = _load(
        bundle, quiet, threads, unload_prefill=unload_prefill, check_hashes=check_hashes, backend=backend
    )
    from stillgraph.conversation import Conversation

    conversation = Conversation(engine)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/reset":
            conversation.clear()
            engine.reset()
        elif line.startswith(SHOW):
            conversation.show(Path(line.removeprefix(SHOW).strip()))
        elif line:
            _turn(conversation, line, options, quiet)


def unpack(
    archive: Annotated[Path, typer.Argument(help="Made by 'stillgraph ship'.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="A new folder.", show_default="the archive's name without .tar")
    ] = None,
) -> None:
    """Unpack an archive, once every file in it has the hash that it is listed with."""
    from stillgraph.archive import unpack as extract

    if out is None and archive.suffix != ".tar":
        raise StillgraphError("unpack", f"{archive} is not named *.tar", "name the new folder with --out")
    place = out or Path(archive.stem)
    contents = extract(archive, place)
    print(f"{place}: {len(contents.files)} files for {contents.runtime}, as they were shipped")


def _turn(conversation: Conversation, line: str, options: dict[str, Any], quiet: bool) -> None:
    """One question and its answer, both added to the chat; at a terminal a failed turn leaves no trace."""
    steps: list[Step] = []
    try:
        ids = conversation.ids(line)
        for step in conversation.engine.stream(ids, **options | {"images": conversation.images}):
            steps.append(step)
            _show(step.text)
    except KeyboardInterrupt:
        if not sys.stdin.isatty() or not steps:
            raise
    except StillgraphError as error:
        if not sys.stdin.isatty():
            raise
        conversation.forget()
        print(f"error: {error}", file=sys.stderr)
        return
    _show("\n")
    conversation.add(line, ids, steps)
    if not quiet:
        _summary(_report(conversation.engine, len(ids), steps, None))


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: list[str] | None,
    images: list[Path],
) -> dict[str, Any]:
    """The options of `Engine.stream`, checked before anything is loaded. Raises StillgraphError."""
    for path in images:
        if not path.is_file():
            there = "is not a file" if path.exists() else "does not exist"
            raise StillgraphError("read image", f"{path} {there}", "give the path of an image file")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    Options(sampling, max_new_tokens, stop)
    return {"max_new_tokens": max_new_tokens, "stop": stop, "images": images, **asdict(sampling)}


def _load(bundle: Path, quiet: bool, threads: int | None, **choices: Any) -> Engine:
    if threads is not None and threads < 1:
        raise StillgraphError("load bundle", f"threads is {threads}", "give 1 or more")
    check_files(bundle, read(bundle))  # what is no bundle is told before ONNX Runtime is imported
    from stillgraph.loading import load

    with Console(stderr=True, quiet=quiet).status(f"loading {bundle}"):
        return load(bundle, threads=threads, **choices)


def _read_prompt(text: str | None, file: str | None, token_ids: str | None, chat: bool) -> str | list[int]:
    given = [value for value in (text, file, token_ids) if value is not None]
    if len(given) != 1:
        problem = f"{len(given)} prompts were given"
        raise StillgraphError("read prompt", problem, "give one of --prompt, --prompt-file and --token-ids")
    if token_ids is not None:
        if chat:
            raise StillgraphError(
                "read prompt", "--token-ids cannot be used with --chat", "leave one of them out"
            )
        return _parse_ids(token_ids)
    if file is None and text != "-":
        return text or ""
    return _read_text(file or "-")


def _read_text(file: str) -> str:
    source = sys.stdin.buffer.read if file == "-" else Path(file).read_bytes
    try:
        return source().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise StillgraphError("read prompt", f"{file}: {error.strerror}", "name a file of text") from error
    except UnicodeDecodeError as error:
        raise StillgraphError("read prompt", f"{file} is not UTF-8 text ({error})", "convert it") from error


def _parse_ids(token_ids: str) -> list[int]:
    try:
        return [int(part) for part in token_ids.split(",") if part.strip()]
    except ValueError:
        problem = f"--token-ids {token_ids!r} is not a list of numbers"
        raise StillgraphError("read prompt", problem, "write them as 2,17,5") from None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(engine: Engine, prompt_tokens: int, steps: list[Step], pss: float | None) -> dict[str, Any]:
    times = Times.of(steps)
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": [step.token for step in steps],
        "text": "".join(step.text for step in steps),
        "finish_reason": steps[-1].finish_reason,
        "load_ms": _rounded(engine.load_seconds * 1e3),
        "ttft_ms": _rounded(times.ttft_ms),
        "tpot_ms": _rounded(times.tpot_ms),
        "peak_rss_mb": _rounded(peak_rss_mb()),
        "peak_pss_mb": _rounded(pss),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _summary(report: dict[str, Any]) -> None:
    parts = [
        f"{report['prompt_tokens']} prompt tokens",
        f"{len(report['tokens'])} tokens ({report['finish_reason']})",
    ]
    parts.append(f"TTFT {report['ttft_ms']:.1f} ms")
    if report["tpot_ms"]:
        parts.append(f"TPOT {report['tpot_ms']:.2f} ms, {1e3 / report['tpot_ms']:.1f} tokens/s")
    if report["peak_rss_mb"] is not None:
        parts.append(f"peak RSS {report['peak_rss_mb']:.0f} MB")
    if report["peak_pss_mb"] is not None:
        parts.append(f"PSS {report['peak_pss_mb']:.0f} MB")
    print(", ".join(parts), file=sys.stderr)
