"""Output of the export's commands: results on stdout, progress on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic_core import to_json
from rich.console import Console, RenderableType
from rich.markup import escape

from stillgraph.exporter.config import Say

FILE_WIDTH = 160  # of tables where stdout is no terminal: none of their cells is cut


@dataclass(frozen=True)
class Output:
    """One command's output."""

    quiet: bool
    as_json: bool

    @contextmanager
    def progress(self) -> Iterator[Say]:
        """Yield what shows the current step: one line that changes, below the sentences that were said; lines
        where stderr is no terminal."""
        console = Console(stderr=True, quiet=self.quiet, highlight=False)
        if not console.is_terminal:
            yield lambda text: console.print(text, markup=False, soft_wrap=True)
            return
        with console.status("", spinner="line") as status:

            def say(text: str) -> None:
                if text.endswith("."):
                    console.print(text, markup=False, soft_wrap=True)
                else:
                    status.update(escape(text))

            yield say

    def result(self, line: dict[str, object], *shown: RenderableType) -> None:
        """One line of JSON, or readable text."""
        if self.as_json:
            print(to_json(line, inf_nan_mode="null").decode(), flush=True)  # JSON has no NaN
            return
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        for part in shown:
            console.print(part, soft_wrap=isinstance(part, str))  # one line, however long
