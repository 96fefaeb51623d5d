"""README.md of this folder, whose parts are written by the scripts beside it."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows))


def keep(start: str, end: str, text: str) -> None:
    """Put a text between two marks that are in the page."""
    before, _, rest = PAGE.read_text(encoding="ascii").partition(start)
    PAGE.write_text(before + start + text + end + rest.partition(end)[2], encoding="ascii")
