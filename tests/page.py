"""Pages whose parts are written by scripts."""

from __future__ import annotations

from pathlib import Path


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows))


def keep(page: Path, start: str, end: str, text: str) -> None:
    """Put a text between two marks that are in the page."""
    before, _, rest = page.read_text(encoding="ascii").partition(start)
    page.write_text(before + start + text + end + rest.partition(end)[2], encoding="ascii")
