"""How long a start takes until its first step is done, part by part."""

from __future__ import annotations

import os
import time
from pathlib import Path

from mvar.log import log
from mvar.run.stopping import Watchdog
from mvar.run.tracking import Stopwatch

IMPORTS = "imports and joining the ranks"
STEP = "first step"


class Startup:
    """Seconds of each part of a start, from the beginning of this process on, and the watchdog's food meanwhile."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._since = time.perf_counter() - process_age_s()
        self.parts_s: dict[str, float] = {}
        self.passed(IMPORTS)

    def passed(self, part: str) -> None:
        """A part is over; the watchdog gives the next one a whole limit."""
        self._end(part, time.perf_counter())
        self._watchdog.feed("start")

    def stepped(self, watch: Stopwatch) -> bool:
        """A step, as long as `watch` says, is known to be done. True for the first one: it ends the start, and is told.

        Where steps are read late, the next one is under way by then; it does not count.
        """
        if STEP in self.parts_s:
            return False
        self._end(STEP, watch.end)
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts_s.items())
        log.info("start: %.1f s until the first step was done (%s)", sum(self.parts_s.values()), parts)
        return True

    def _end(self, part: str, end: float) -> None:
        self.parts_s[part] = round(end - self._since, 3)
        self._since = end


def process_age_s() -> float:
    """Seconds since this process began, to a hundredth; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks since the system started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    except (OSError, AttributeError):
        return 0.0
