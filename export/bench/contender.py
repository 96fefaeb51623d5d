"""Who takes part in a benchmark: a name, how its model is made, how its process is started.

Other packages add contenders by an entry point of the group `stillgraph.contenders`: a function
`find(source: ContenderSource) -> list[Contender]`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "stillgraph.contenders"


@dataclass(frozen=True)
class ContenderSource:
    """What contenders are made from.

    checkpoint: as the user named it, a folder or a hub id; checkpoint_sha256: what it must hash to. work: a
    folder to keep environments in; models: the part of it for this checkpoint's models. ctx: cache slots;
    max_len: tokens of a prefill's call.
    """

    checkpoint: str
    checkpoint_sha256: str
    work: Path
    models: Path
    ctx: int
    max_len: int = 128


@dataclass(frozen=True)
class Making:
    """A command to run once, where `path` does not exist: it makes that path."""

    path: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    name: what `--against` calls it; label: what people read; group: a word that names all of a kind at once.
    file: the script with `open_contender`; model: what it opens; options: words of its own kind. python: the
    interpreter. prepare: how the model is made. missing: why it cannot run here, with the command that helps.
    exact: see `stillgraph.exporter.bench.report.Result`. sees: whether it takes a picture.
    """

    name: str
    label: str
    group: str
    file: Path
    model: str
    options: dict[str, str] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    prepare: tuple[Making, ...] = ()
    missing: str | None = None
    exact: bool = False
    sees: bool = False


def others(source: ContenderSource) -> list[Contender]:
    """The contenders that other packages add."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return [contender for entry in found for contender in entry.load()(source)]
