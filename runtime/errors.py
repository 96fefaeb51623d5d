"""One error type: a sentence that names the stage, the value and the remedy."""

from __future__ import annotations

from typing import Any

LONGEST = 1000  # characters of a problem: a value in it may be of any length


def first_line(error: Exception) -> str:
    """The first 300 characters of what another library says is wrong, or the error's class."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def wrong_field(error: Any, whole: str) -> str:
    """The first field that pydantic's ValidationError tells of, and what is wrong there; whole: the name of
    all of it, where it is no field."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"


class StillgraphError(Exception):
    """Wrong use or bad input, told in one sentence. The command line turns it into exit code 2.

    stage: what was being done ("load bundle"); problem: what is wrong, with the value; remedy: what to do.
    """

    exit_code = 2

    def __init__(self, stage: str, problem: str, remedy: str) -> None:
        if len(problem) > LONGEST:  # what is wrong is said before the value or behind it
            problem = f"{problem[: LONGEST // 2]}...{problem[-LONGEST // 2 :]}"
        self.stage, self.problem, self.remedy = stage, problem, remedy
        super().__init__(f"{stage}: {problem}; {remedy}.")

    def __reduce__(self) -> tuple[type[StillgraphError], tuple[str, str, str]]:
        """For pickle, which would call it with the one sentence."""
        return type(self), (self.stage, self.problem, self.remedy)


class CheckFailed(StillgraphError):
    """The input was fine and a check on the result failed. Exit code 1."""

    exit_code = 1
