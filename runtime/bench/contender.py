"""Who takes part in a benchmark: a name, how its model is made, how its process is started.

Other packages add contenders by an entry point of the group `stillgraph.contenders`: a function
`find(source: Source) -> list[Contender]`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

GROUP = "stillgraph.contenders"


@dataclass(frozen=True)
class Source:
    """What contenders are made from: a checkpoint folder, a folder to keep their models and environments in
    (`work`), and the cache slots that are wanted. models: the part of `work` that is this checkpoint's."""

    checkpoint: Path
    work: Path
    ctx: int
    models: Path


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    name: what `--against` calls it; label: what people read; group: a word that names all of a kind at once.
    file: the script with `open_contender`; model: what it opens; options: words of its own kind. python: the
    interpreter. prepare: the command that makes the model, run once where `model` does not exist. missing:
    why it cannot run here, with the command that helps. exact: see `runtime.bench.report.Result`.
    """

    name: str
    label: str
    group: str
    file: Path
    model: Path
    options: dict[str, str] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    prepare: tuple[str, ...] = ()
    missing: str | None = None
    exact: bool = False
