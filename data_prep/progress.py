"""What a tokenize task says while it works, and how long its encoder waited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mvar.durations import duration
from mvar.log import log

PROGRESS_EVERY_S = 5.0


@dataclass
class TokenizeProgress:
    """A line every few seconds: shards, images, images per second, share of time the encoder was busy, time left.

    `total`: images that this task will make, None where it depends on the other tasks. The clock starts when images are
    first waited for, so the verification of earlier shards does not count.
    """

    title: str
    total: int | None
    images: int = 0
    shards: int = 0
    waited_s: float = 0.0
    began_s: float | None = None
    said_s: float = 0.0

    @property
    def seconds(self) -> float:
        return 0.0 if self.began_s is None else time.monotonic() - self.began_s

    @property
    def busy_share(self) -> float:
        return 1 - self.waited_s / max(self.seconds, 1e-9)

    @contextmanager
    def waiting(self, idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time inside as lost, unless the encoder is still at work when it ends."""
        now_s = time.monotonic()
        if self.began_s is None:
            self.began_s = self.said_s = now_s
        try:
            yield
        finally:
            if idle():
                self.waited_s += time.monotonic() - now_s

    def add(self, images: int) -> None:
        self.images += images
        if time.monotonic() - self.said_s >= PROGRESS_EVERY_S:
            self.said_s = time.monotonic()
            speed = self.images / self.seconds
            of = "" if self.total is None else f" of {self.total:,}"
            left = "" if self.total is None else f"  left {duration((self.total - self.images) / speed)}"
            self.say(
                f"{self.shards} shards, {self.images:,}{of} images  {speed:.1f} img/s  "
                f"encoder busy {self.busy_share:.0%}{left}"
            )

    def say(self, text: str) -> None:
        log.info("%s: %s", self.title, text)
