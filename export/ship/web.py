"""ONNX Runtime in the browser: the page of `stillgraph serve` as files that any server can serve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stillgraph.exporter.ship.browser import Browser, chromium
from stillgraph.exporter.ship.check import PATIENCE
from stillgraph.exporter.ship.environments import missing
from stillgraph.exporter.ship.runtimes import Runtime
from stillgraph.manifest import Manifest
from stillgraph.serve.packages import PAGE, PAGE_FILES, packages, page_files

SERVER = "serve.py"


class Web(Runtime):
    """The page, its packages, and a server of a few lines."""

    name, title, sources = "web", "ONNX Runtime Web", ("web",)

    def refuses(self, manifest: Manifest) -> str | None:
        return super().refuses(manifest) or (None if packages() else missing("page"))

    def driver_files(self) -> list[Path]:
        return [*super().driver_files(), *(PAGE / name for name in PAGE_FILES)]

    def copy_driver(self, folder: Path) -> None:
        super().copy_driver(folder)
        for name, path in page_files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)

    def command(self, folder: Path) -> Sequence[str] | str:
        if chromium() is None:
            return "Chromium is not installed"
        return [sys.executable, "-m", "stillgraph.exporter.ship.web"]


RUNTIME = Web()


def main() -> None:
    """golden.json through the page of the working directory, in Chromium: a line of JSON for each case."""
    command = [sys.executable, SERVER, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with Browser() as page:
                page.open(server.stdout.readline().strip())
                if page.until("document.body.dataset.state") != "ready":
                    sys.exit(str(page.value("document.body.innerText")))
                page.value("runGolden()")
                page.until("globalThis.golden?.at(-1) === null", PATIENCE)
                version = page.call("Browser.getVersion")["product"]
                for line in page.value("golden")[:-1]:
                    print(json.dumps(line | {"versions": {"browser": version}}))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
