"""Peak memory of the process, and the times of a request.

TTFT: from the request to its first token. TPOT: mean time of the tokens after the first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillgraph.row import Step

MB = 1e6
KIB = 1024 / MB


@dataclass(frozen=True)
class Times:
    """Milliseconds of one request; loading graphs counts in neither. tpot_ms is None for a single token."""

    ttft_ms: float
    tpot_ms: float | None

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Times:
        """The times of a request's steps, at least one."""
        first, last = steps[0].elapsed, steps[-1].elapsed
        later = len(steps) - 1
        return cls(first * 1e3, (last - first) * 1e3 / later if later else None)


def pss_mb(process: int | str = "self") -> float | None:
    """Proportional set size of a process now: a page that is mapped twice counts once.

    None where the process has ended or the system has no /proc.
    """
    return _line(f"/proc/{process}/smaps_rollup", "Pss:")


def rss_mb() -> float | None:
    """Resident set size now. None where the system has no /proc."""
    return _line("/proc/self/status", "VmRSS:")


def peak_rss_mb() -> float | None:
    """The largest resident set size of the process so far. None on Windows.

    On Linux not getrusage's, with which a process begins at the peak of the one that started it.
    """
    if sys.platform == "win32":
        return None
    if (peak := _line("/proc/self/status", "VmHWM:")) is not None:
        return peak
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / MB if sys.platform == "darwin" else found * KIB


def _line(path: str, name: str) -> float | None:
    """A line of a file of /proc in KiB, as MB."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith(name)), None)


class PeakPss:
    """The largest PSS seen in a `with` block: at its start, at its end, and at each call of `sample`.

    A reading walks every mapped page, 10 ms a GB and more. So it is taken at moments that matter, such as
    after a load, and never by a thread or between two tokens: that cost a decode step its cores.
    """

    def __init__(self) -> None:
        self.mb: float | None = None

    def sample(self) -> None:
        """Read once now."""
        now = pss_mb()
        if now is not None:
            self.mb = max(now, self.mb or 0.0)

    def __enter__(self) -> PeakPss:
        self.sample()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sample()
