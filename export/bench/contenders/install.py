"""Install peers, each into an environment of its own.

    python -m stillgraph.exporter.bench.contenders.install llama genai openvino [--work artifacts/bench]

What is there already stays: remove WORK/env/<peer> to have it built again. llama.cpp is compiled for this
machine: 5 to 10 minutes on two cores, with a C++ compiler. `stillgraph bench` then writes their models from
the checkpoint by itself.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from stillgraph.exporter.bench.contenders.catalog import PEERS, Peer


def install(peer: Peer, work: Path) -> None:
    """Raises CalledProcessError; what a failed install has left is removed."""
    python = peer.python(work)
    if python.exists():
        return
    folder = python.parents[1]
    try:
        venv.create(folder, with_pip=True, symlinks=True)
        # pip keeps what it compiled for the next time, and does not ask under which variables that was.
        fresh = ["--no-cache-dir"] if peer.environment else []
        pip = [str(python), "-m", "pip", "install", "--quiet", *fresh]
        flags = {name: f"{os.environ.get(name, '')} {value}" for name, value in peer.environment.items()}
        subprocess.run([*pip, *peer.packages], check=True, env={**os.environ, **flags})
        if peer.removed:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *peer.removed], check=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="+", choices=[peer.name for peer in PEERS])
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"))
    args = parser.parse_args()
    failed = 0
    for peer in PEERS:
        if peer.name not in args.peers:
            continue
        try:
            install(peer, args.work.resolve())
            print(f"{peer.name}: ready")
        except subprocess.CalledProcessError as error:  # a peer that fails does not stop the others
            failed = 1
            print(f"{peer.name}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
