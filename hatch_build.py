"""An editable install reads the folders of this repository under their import names, by links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Git ignores them. Of folders, so that a new file is there at once. In wheels pyproject.toml does the same.
LINKS = {
    "build/editable/stillgraph": "runtime",
    "runtime/exporter": "export",
    "runtime/patches": "patches",
}


class EditableLinks(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        for name, folder in LINKS.items():
            link = Path(self.root, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(*[".."] * name.count("/"), folder), target_is_directory=True)
