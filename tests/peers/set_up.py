"""Install the peers, each into an environment of its own, and write their models from one checkpoint.

    python tests/peers/set_up.py DIR --checkpoint CHECKPOINT [--only llama,genai,openvino]

What is there already stays, so it can be run again. llama.cpp is compiled for this machine: 10 minutes on two
cores, with a C++ compiler. Each of the others takes a few minutes, 5 GB of memory and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from catalog import PEERS, Peer


def claim(models: Path, checkpoint: Path) -> None:
    """Note whose models these are, so that no comparison takes those of another checkpoint."""
    models.mkdir(parents=True, exist_ok=True)
    source, digest = (
        models / "source.txt",
        hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest(),
    )
    if source.exists() and source.read_text(encoding="ascii").strip() != digest:
        raise SystemExit(f"{models} holds models of another checkpoint: give another folder")
    source.write_text(digest + "\n", encoding="ascii")


def install(peer: Peer, folder: Path) -> None:
    python = peer.python(folder)
    if python.exists():
        return
    venv.create(folder / peer.name, with_pip=True, symlinks=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *peer.packages], check=True)
    if peer.removed:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *peer.removed], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--only", default=",".join(peer.name for peer in PEERS))
    args = parser.parse_args()
    folder, failed = args.folder.resolve(), []
    checkpoint = Path(args.checkpoint).resolve()
    claim(folder / "models", checkpoint)
    for peer in PEERS:
        if peer.name not in args.only.split(","):
            continue
        try:
            install(peer, folder)
            if not all((folder / "models" / model).exists() for model in peer.models):
                subprocess.run(peer.prepare(folder, str(checkpoint)), check=True)
            print(f"{peer.name}: ready")
        except subprocess.CalledProcessError as error:  # one peer that fails stops no other
            failed.append(peer.name)
            print(f"{peer.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
