"""A line now and then about work that takes long: how much is done, how fast, how much time is left."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mvar.durations import duration
from mvar.log import log


@dataclass
class ProgressLine:
    """`add` after each piece of work. `total`: of all pieces, None where nobody knows. The clock starts at once."""

    what: str
    total: int | None
    unit: str = "images"
    every_s: float = 10.0
    done: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Set the clock: the time before does not count."""
        self._began_s = self._said_s = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    def add(self, count: int, more: str = "") -> None:
        """`more`: what else the line says."""
        self.done += count
        now_s = time.monotonic()
        if now_s - self._said_s < self.every_s and self.done != self.total:
            return
        self._said_s = now_s
        rate = self.done / max(now_s - self._began_s, 1e-9)
        of, left = "", ""
        if self.total is not None:
            of, left = f"/{self.total:,}", f"   {duration((self.total - self.done) / rate)} left"
        speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        log.info("%s: %s%s %s   %s/s%s%s", self.what, f"{self.done:,}", of, self.unit, speed, more, left)
