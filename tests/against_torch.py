"""Compare a bundle with PyTorch on this machine: greedy tokens, or time and memory in turns.

    python tests/against_torch.py greedy BUNDLE CHECKPOINT --prompt-tokens 100 --tokens 900
    python tests/against_torch.py speed  BUNDLE CHECKPOINT --prompt-tokens 128 --tokens 32 --turns 3

`speed` runs every contender in a process of its own, in turns, so that changing load on the machine affects
all equally: read the ratios, not the times. A tool to be run by hand: it is no test, because it takes a large
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NEAR = 1e-4  # two logits closer than this may swap places between two correct sums
THREADS = len(os.sched_getaffinity(0))


def prompt_ids(count: int, vocab: int) -> list[int]:
    return np.random.default_rng(7).integers(10, vocab, count).tolist()


def greedy(args: argparse.Namespace) -> int:
    """Every greedy step of the engine against PyTorch's, PyTorch fed with the engine's tokens."""
    import torch
    from transformers import DynamicCache

    from stillgraph import load
    from stillgraph.exporter.checkpoint import open_checkpoint

    engine = load(args.bundle)
    ids = prompt_ids(args.prompt_tokens, engine.manifest.model.vocab_size)
    # Random weights choose stop tokens like any other.
    steps = engine.stream(ids, max_new_tokens=args.tokens, stop_tokens=())
    tokens = [step.token for step in steps]
    del engine
    model = open_checkpoint(args.checkpoint).load()
    cache, fed, equal, near = DynamicCache(), torch.tensor([ids]), 0, 0
    for index, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        best = int(logits.argmax())
        equal += best == token
        near += best != token and float(logits[best] - logits[token]) < NEAR
        if best != token:
            print(f"step {index}: {token}, PyTorch {best}, {float(logits[best] - logits[token]):.1e} apart")
        fed = torch.tensor([[token]])
    print(json.dumps({"steps": len(tokens), "equal": equal, "near_ties": near}))
    return 0 if equal + near == len(tokens) == args.tokens else 1


def torch_run(args: argparse.Namespace) -> int:
    """PyTorch eager fp32 with its growing cache, as one contender: JSON as of `stillgraph run --json`."""
    import resource

    import torch

    from stillgraph.exporter.checkpoint import open_checkpoint

    torch.set_num_threads(THREADS)
    model = open_checkpoint(args.checkpoint).load()
    fed, cache, marks, tokens = torch.tensor([json.loads(args.ids)]), None, [time.perf_counter()], []
    with torch.no_grad():
        for _ in range(args.tokens):
            output = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, fed = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(int(fed))
            marks.append(time.perf_counter())
    result = {
        "tokens": tokens,
        "ttft_ms": 1e3 * (marks[1] - marks[0]),
        "tpot_ms": 1e3 * (marks[-1] - marks[1]) / (args.tokens - 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576,
    }
    print(json.dumps(result))
    return 0


def speed(args: argparse.Namespace) -> int:
    vocab = json.loads((Path(args.bundle) / "manifest.json").read_text())["model"]["vocab_size"]
    ids, count = prompt_ids(args.prompt_tokens, vocab), str(args.tokens)
    run = [sys.executable, "-m", "stillgraph", "run", args.bundle, "--token-ids", ",".join(map(str, ids))]
    run += ["--max-new-tokens", count, "--threads", str(THREADS), "--json", "--quiet"]
    torch = [sys.executable, __file__, "torch", args.bundle, args.checkpoint, "--tokens", count]
    contenders = {
        "torch": [*torch, "--ids", json.dumps(ids)],
        "stillgraph": run,
        "stillgraph --unload-prefill": [*run, "--unload-prefill"],
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for turn in range(args.turns):
        for name, command in contenders.items():
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            rows[name].append(json.loads(line))
            print(
                turn,
                name,
                {k: v for k, v in rows[name][-1].items() if k.endswith(("_ms", "_mb"))},
                flush=True,
            )
    base = {key: statistics.median(row[key] for row in rows["torch"]) for key in ("ttft_ms", "tpot_ms")}
    for name, found in rows.items():
        medians = {key: statistics.median(row[key] for row in found) for key in base}
        ratios = " ".join(f"{key[:4]} {medians[key]:.0f} ms ({medians[key] / base[key]:.2f})" for key in base)
        peak = max(row["peak_rss_mb"] for row in found) / 1e3
        same = all(row["tokens"] == rows["torch"][0]["tokens"] for row in found)
        print(f"{name:28s} {ratios} peak RSS {peak:.2f} GB, same tokens {same}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["greedy", "speed", "torch"])
    parser.add_argument("bundle")
    parser.add_argument("checkpoint")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ids", default="[]", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return {"greedy": greedy, "speed": speed, "torch": torch_run}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
