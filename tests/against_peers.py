"""Compare bundles with other runtimes on this machine: TTFT, TPOT, load and memory, in turns.

    python tests/peers/set_up.py DIR --checkpoint CHECKPOINT       # once; see tests/peers/README.md
    python tests/against_peers.py --bundle B [--bundle B2] --checkpoint CHECKPOINT --peers DIR --turns 5

Every contender runs in a fresh process with the same ids, threads and number of tokens, in turns A B C A B C,
so that the machine's moods hit all alike: read the ratios, not the times. A ratio is ours over theirs within
one turn. A tool to be run by hand: it is no test, because it takes a large checkpoint and other runtimes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "peers"))  # no package: the peers run its files as scripts
from catalog import PEERS
from protocol import Request
from turns import DISTURBED, Entry, take_turn

HERE = Path(__file__).parent / "peers"
TIMES = {"ttft_ms": 0, "tpot_ms": 1, "load_s": 2, "peak_pss_mb": 0, "peak_rss_mb": 0}  # and their decimals
RATIOS = ("ttft_ms", "tpot_ms", "peak_pss_mb")
Rows = dict[str, list[dict[str, Any] | None]]  # of each contender, one a turn; None for a turn that failed


def prompt_ids(count: int, vocab: int) -> list[int]:
    ids: list[int] = np.random.default_rng(7).integers(10, vocab, count).tolist()
    return ids


def entries(args: argparse.Namespace) -> list[Entry]:
    """All contenders: the bundles first, then every model of every peer, the missing ones too."""
    config = json.loads((Path(args.checkpoint) / "config.json").read_text(encoding="utf-8"))
    same_model(args.bundle, config)
    ids, far = (prompt_ids(count, config["vocab_size"]) for count in (args.prompt_tokens, args.context))

    def request(model: Path) -> Request:
        return Request(str(model.resolve()), ids, args.tokens, args.threads, args.ctx, far)

    found = [Entry(b.name, Path(sys.executable), HERE / "ours.py", request(b)) for b in args.bundle]
    folder = args.peers.resolve()
    for peer in PEERS:
        for model in peer.models:
            why = peer.missing(folder, model) or other_source(folder, args.checkpoint)
            task = request(folder / "models" / model)
            found.append(
                Entry(model.removesuffix(".gguf"), peer.python(folder), HERE / peer.script, task, why)
            )
    return [entry for entry in found if not args.only or any(word in entry.name for word in args.only)]


def same_model(bundles: list[Path], config: dict[str, Any]) -> None:
    """Refuse bundles of another checkpoint: their comparison would mean nothing."""
    for bundle in bundles:
        if not (bundle / "manifest.json").is_file():
            raise SystemExit(f"{bundle} is no bundle: it has no manifest.json")
        model = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["model"]
        sizes = [model["vocab_size"], model["hidden_size"], len(model["layers"])]
        if sizes != [config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")]:
            raise SystemExit(
                f"{bundle} is not of the checkpoint: its vocabulary, width and depth are {sizes}"
            )
    if len({bundle.name for bundle in bundles}) < len(bundles):
        raise SystemExit("two bundles have the same folder name, which names them in the table")


def other_source(folder: Path, checkpoint: str) -> str | None:
    """Why the peers' models are not of this checkpoint; None where they are."""
    written = (folder / "models" / "source.txt").read_text(encoding="ascii").strip()
    now = hashlib.sha256((Path(checkpoint) / "config.json").read_bytes()).hexdigest()
    return None if written == now else "prepared from another checkpoint: give set_up.py another DIR"


def measure(args: argparse.Namespace, contenders: list[Entry], rows: Rows, save: Any) -> None:
    """All turns into `rows`; `save` is called after each, so that a killed run leaves its rows."""
    failed: dict[str, str] = {entry.name: entry.skipped for entry in contenders if entry.skipped}
    for turn in range(args.turns):
        for entry in contenders:
            if entry.name in failed:
                continue
            row = take_turn(entry, args.patience)
            if "error" in row:
                failed[entry.name] = row["error"]
                rows[entry.name].append(None)
            else:
                rows[entry.name].append(row)
            shown = {key: round(value, 2) for key, value in row.items() if isinstance(value, float)}
            print(turn, entry.name, shown or row, file=sys.stderr, flush=True)
            save(rows, failed)


def values(rows: list[dict[str, Any] | None], key: str) -> list[float]:
    return [row[key] for row in rows if row and key in row]


def spread(found: list[float], decimals: int) -> str:
    """Median and range."""
    if not found:
        return "-"
    low, middle, high = (f"{f(found):.{decimals}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def table(rows: Rows, failed: dict[str, str], context: int) -> str:
    """Markdown: median (least-most) over the turns."""
    columns = dict(TIMES) | ({"context_tpot_ms": 1, "context_ratio": 2} if context else {})
    lines = ["| contender | " + " | ".join([*columns, "note"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, found in rows.items():
        calm: list[dict[str, Any] | None] = [
            row for row in found if row and row["other_cores"] < DISTURBED
        ] or found
        cells = [spread(values(calm, key), decimals) for key, decimals in columns.items()]
        noisy = sum(value >= DISTURBED for value in values(found, "other_cores"))
        note = failed.get(name) or (
            f"{noisy} of {len(found)} turns disturbed, left out if others were not" if noisy else ""
        )
        lines.append(f"| {name} | " + " | ".join([*cells, note]) + " |")
    return "\n".join(lines)


def ratios(ours: str, rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Ours over theirs: {contender: {measure: [ratio of a turn]}}, of undisturbed turns if there are any."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, others in rows.items():
        pairs = [(a, b) for a, b in zip(rows[ours], others, strict=False) if a and b]
        calm = [pair for pair in pairs if max(row["other_cores"] for row in pair) < DISTURBED]
        pairs = calm or pairs
        if name != ours and pairs:
            found[name] = {key: [a[key] / b[key] for a, b in pairs] for key in RATIOS}
    return found


def ratio_table(ours: str, rows: Rows) -> str:
    lines = [f"| {ours} / contender | " + " | ".join(RATIOS) + " |", "|---" * (len(RATIOS) + 1) + "|"]
    for name, found in ratios(ours, rows).items():
        lines.append(f"| {name} | " + " | ".join(spread(found[key], 2) for key in RATIOS) + " |")
    return "\n".join(lines)


def header(args: argparse.Namespace) -> dict[str, Any]:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "command": " ".join(["python", *sys.argv]),
    }


def main() -> int:
    args = arguments()
    contenders, report = entries(args), header(args)
    failed: dict[str, str] = {}

    def save(rows: Rows, found: dict[str, str]) -> None:
        failed.update(found)
        bundles = [bundle.name for bundle in args.bundle if bundle.name in rows]
        report.update(rows=rows, failed=found, ratios={name: ratios(name, rows) for name in bundles})
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    save({entry.name: [] for entry in contenders}, {e.name: e.skipped for e in contenders if e.skipped})
    rows: Rows = {entry.name: [] for entry in contenders}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the contender's process too
    with contextlib.suppress(KeyboardInterrupt):  # the table of what is there is still wanted
        measure(args, contenders, rows, save)
    print("\n".join(f"{key}: {report[key]}" for key in ("date", "cpu", "cores", "system", "command")))
    for name, found in rows.items():
        if versions := next((row["versions"] for row in found if row), None):
            print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    print(f"\nmedian (least-most) of {args.turns} turns\n\n{table(rows, failed, args.context)}")
    for bundle in args.bundle:
        if bundle.name in rows and ratios(bundle.name, rows):
            print(f"\n{ratio_table(bundle.name, rows)}")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, action="append", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--peers", type=Path, required=True, help="the folder that set_up.py filled")
    parser.add_argument(
        "--only", action="append", help="contenders whose name has this word; may be repeated"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=1024, help="slots of the peers' caches")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--context", type=int, default=0, help="also measure after a prompt of so many tokens"
    )
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
