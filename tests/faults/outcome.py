"""What came out of a trial."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from stillgraph.errors import StillgraphError

Kind: TypeAlias = Literal["right", "refused", "wrong", "raw"]
Trial: TypeAlias = Callable[[int], "Outcome"]  # of a number: a seed and a number are always one trial


@dataclass(frozen=True)
class Outcome:
    """right: the right answer; refused: one sentence; wrong: another answer and no word of it; raw: another
    exception, a dead process, or none that ends. what: was done, and what came of it."""

    kind: Kind
    what: str = ""


def outcome(call: Callable[[], bool], what: str = "") -> Outcome:
    """What a call came to that tells whether its answer is right."""
    try:
        right = call()
    except StillgraphError as error:
        one = "\n" not in str(error) and len(str(error)) < 2000 and error.exit_code == 2
        return Outcome("refused" if one else "raw", f"{what}: {error!s:.300}")
    except Exception as error:
        return Outcome("raw", f"{what}: {type(error).__name__}: {error!s:.200}")
    return Outcome("right" if right else "wrong", what)


@dataclass
class Tally:
    """The trials of one name: how many came to what, and those that must not be."""

    name: str
    counts: Counter[Kind] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def add(self, found: Outcome) -> None:
        self.counts[found.kind] += 1
        if found.kind in ("wrong", "raw"):
            self.bad.append(f"{found.kind}: {found.what}")
        self.seconds = time.monotonic() - self.began

    @property
    def failed(self) -> bool:
        """Nothing tried is no success."""
        return bool(self.bad) or not self.counts.total()


HEAD = ("trials", "tried", "survived", "right", "refused", "silently wrong", "raw", "seconds", "note")


def table(tallies: list[Tally]) -> str:
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for one in tallies:
        count = one.counts
        survived = count["right"] + count["refused"]
        cells = (count.total(), survived, count["right"], count["refused"], count["wrong"], count["raw"])
        rows.append((one.name, *map(str, cells), f"{one.seconds:.0f}", one.note))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
