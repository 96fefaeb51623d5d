"""ONNX Runtime in C++, of both targets. Its wheel has the library, and no headers.

    python -m stillgraph.exporter.ship.cpp_onnxruntime

unpacks those of Debian's libonnxruntime-dev where they are not there, builds the driver, and prints where it
is. The C interface only grows, so that headers of an earlier version serve any later library.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from stillgraph.exporter.ship import environments
from stillgraph.exporter.ship.cpp import Cpp, Library, output
from stillgraph.exporter.targets import CacheWrite
from stillgraph.serve.packages import place

HEADER, PACKAGE = "onnxruntime_cxx_api.h", "libonnxruntime-dev"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE = "trixie"  # the first release of Debian that has it
WHERE = "import onnxruntime as o; print(o.__version__, o.__path__[0], sep='\\n')"


class OnnxRuntimeCpp(Cpp):
    """The same program over another library."""

    name, title, targets = "c++-ort", "ONNX Runtime in C++", ("portable", "onnxruntime")
    cache_write: CacheWrite = "ScatterElements"

    def lacking(self) -> str | None:
        if environments.python("ort") is None:
            return environments.missing("ort")
        if headers() is None:
            return f"{HEADER} not found: python -m {__name__}, or apt-get install {PACKAGE}"
        return None

    def library(self) -> Library:
        interpreter = environments.python("ort") or sys.executable
        version, package = output([interpreter, "-c", WHERE]).splitlines()[-2:]
        (found,) = Path(package).glob("capi/libonnxruntime.so.*")
        named = own() / "lib" / "libonnxruntime.so.1"  # as programs look for it
        if not named.is_file() or not named.samefile(found):
            named.parent.mkdir(parents=True, exist_ok=True)
            named.unlink(missing_ok=True)
            named.symlink_to(found)
        options = f"-DONNXRUNTIME_INCLUDE={headers()}", f"-DONNXRUNTIME_LIBRARY={named}"
        return Library(version, ("-DRUNTIME=onnxruntime", *options))


RUNTIME = OnnxRuntimeCpp()


def own() -> Path:
    """The folder of the library's link, and of headers that are not the system's."""
    return place() / "onnxruntime-c++"


def headers() -> Path | None:
    """The folder of the headers; None where there is none."""
    places = own() / "usr/include/onnxruntime", Path("/usr/include/onnxruntime")
    return next((folder for folder in places if (folder / HEADER).is_file()), None)


def unpack_headers() -> None:
    """Out of Debian's package, from the mirror that apt-get uses, without installing it.

    Raises StillgraphError.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        targets = output(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"])
        mirror = next(line for line in targets.splitlines() if "security" not in line)
        signed = f"[signed-by={KEYRING}] " if KEYRING.is_file() else ""
        (folder / "sources.list").write_text(f"deb {signed}{mirror} {SUITE} main\n", encoding="utf-8")
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
        }
        apt = ["apt-get", "-q", *(f"-o{key}={value}" for key, value in settings.items())]
        output([*apt, "update"])
        output([*apt, "download", PACKAGE], folder)
        (package,) = folder.glob("*.deb")
        output(["dpkg-deb", "--extract", str(package), os.fspath(own())])


if __name__ == "__main__":
    if headers() is None:
        unpack_headers()
    print(RUNTIME.missing() or RUNTIME.program())
