"""The page's files: its own, those of the packages from npm, and the bundle's."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from stillgraph.manifest import MANIFEST, Manifest
from stillgraph.serve.packages import FILES, PAGE, PAGE_FILES, page_files
from stillgraph.serve.refusals import Refused, answer

TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
# With these a page may have threads; and a browser asks each time whether its copy is still right.
HEADERS = {
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cache-control": "no-cache",
}


class Site:
    """The routes of the page. Of the bundle only the files that its manifest names are given out."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        of_bundle = [MANIFEST, *(file.path for file in manifest.all_files())]
        self._files = {path: bundle / path for path in of_bundle} | {name: PAGE / name for name in PAGE_FILES}
        self.routes = [Route(f"/{name}", self._file) for name in ("", *self._files, *FILES)]

    async def _file(self, request: Request) -> Response:
        name = request.url.path.strip("/") or "index.html"
        path = (self._files | page_files()).get(name)
        if path is None or not path.is_file():
            return answer(Refused(404, f"{name} is not there any more, or never was."))
        kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers=HEADERS)
