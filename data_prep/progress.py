"""What a tokenize task says while it works, and how long its encoder waited."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mvar.log import log
from mvar.run.progress import ProgressLine


class TokenizeProgress:
    """A line every few seconds: images, shards, images per second, share of time the encoder was busy, time left.

    `total`: images that this task will make, None where it depends on the other tasks. The clock starts when images are
    first waited for, so the verification of earlier shards does not count.
    """

    def __init__(self, title: str, total: int | None) -> None:
        self._line, self._begun = ProgressLine(title, total, every_s=5.0), False
        self.shards, self.waited_s = 0, 0.0

    @property
    def images(self) -> int:
        return self._line.done

    @property
    def seconds(self) -> float:
        return self._line.seconds if self._begun else 0.0

    @property
    def busy_share(self) -> float:
        return 1 - self.waited_s / max(self.seconds, 1e-9)

    def expect(self, total: int) -> None:
        """So many images are this task's."""
        self._line.total = total

    @contextmanager
    def waiting(self, idle: Callable[[], bool]) -> Iterator[None]:
        """Counts the time inside as lost, unless the encoder is still at work when it ends."""
        if not self._begun:
            self._begun = True
            self._line.restart()
        now_s = time.monotonic()
        try:
            yield
        finally:
            if idle():
                self.waited_s += time.monotonic() - now_s

    def add(self, images: int) -> None:
        self._line.add(images, f"   {self.shards} shards, encoder busy {self.busy_share:.0%}")

    def say(self, text: str) -> None:
        log.info("%s: %s", self._line.what, text)
