"""Peak memory of the process, and the times of a request.

TTFT: from the request to its first token. TPOT: mean time of the tokens after the first.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.engine import Step

SMAPS = Path("/proc/self/smaps_rollup")
MB = 1024 * 1024


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


def pss_mb() -> float | None:
    """Proportional set size now: a page that is mapped twice counts once. None where the system has none."""
    try:
        lines = SMAPS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), None)


def rss_mb() -> float | None:
    """Resident set size now. None where the system has no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:")), None)


def peak_rss_mb() -> float | None:
    """The largest resident set size of the process so far, from getrusage. None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MB if sys.platform == "darwin" else peak / 1024


class PeakPss:
    """The largest PSS seen while in a `with` block: sampled by a thread, and at each call of `sample`.

    Reading PSS walks every mapped page, 20 ms and more for a process of some GB: the thread leaves 20 times
    as long between two readings, 50 ms at least.
    """

    def __init__(self) -> None:
        self.mb: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def sample(self) -> None:
        """Read once now: for a moment known to matter, such as after a load."""
        now = pss_mb()
        if now is not None:
            self.mb = max(now, self.mb or 0.0)

    def __enter__(self) -> PeakPss:
        self.sample()
        if self.mb is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self.sample()

    def _watch(self) -> None:
        cost = 0.0
        while not self._done.wait(max(0.05, 20 * cost)):
            began = time.perf_counter()
            self.sample()
            cost = time.perf_counter() - began
