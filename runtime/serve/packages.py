"""The page's packages of npm, fetched once by npm itself as the lock file says.

    python -m stillgraph.serve.packages

puts them under STILLGRAPH_ENVIRONMENTS, or into the user's cache folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("page")
# The driver in JavaScript, which runs in Node.js as well, and the page with all that it is made of.
MODULES = ("stillgraph.js", "graphs.js", "text.js", "sampling.js", "pictures.js", "golden.js")
PAGE_FILES = ("index.html", "page.css", "page.js", "worker.js", "sw.js", *MODULES)
# What the page asks for of packages, and where npm puts it.
FILES = {
    "packages/ort.wasm.bundle.min.mjs": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "packages/ort-wasm-simd-threaded.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "packages/tokenizers.mjs": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "packages/jinja.js": "@huggingface/jinja/dist/index.js",
}
NPM_CI = ("ci", "--ignore-scripts", "--no-audit", "--no-fund")


def place() -> Path:
    """The folder of packages that are not Python's, or not for this Python."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("STILLGRAPH_ENVIRONMENTS") or cache / "stillgraph" / "environments")


def packages(name: str = "page") -> Path | None:
    """A folder that has node_modules; None without."""
    folder = place() / name
    return folder if (folder / "node_modules").is_dir() else None


def page_files() -> dict[str, Path]:
    """The packages' files by the path that the page asks for; none where they were not fetched."""
    folder = packages()
    return {name: folder / "node_modules" / path for name, path in FILES.items()} if folder else {}


def fetch(name: str, lists: Path) -> None:
    """Have npm fetch what a folder's package.json and lock file list, whole or not at all.

    Raises OSError without npm, and CalledProcessError where it fails.
    """
    folder = place() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        staged = Path(scratch) / "whole"
        staged.mkdir()
        for path in lists.glob("package*.json"):
            shutil.copyfile(path, staged / path.name)
        subprocess.run(["npm", *NPM_CI], cwd=staged, check=True, stdout=subprocess.DEVNULL)
        staged.rename(folder)


def main() -> int:
    try:
        if not packages():
            fetch("page", PAGE)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: npm did not fetch the page's packages ({error}); is Node.js there?", file=sys.stderr)
        return 2
    print(f"ready in {place() / 'page'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
