"""When a run stops: what may ask it to, and what ends one that hangs."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from mvar.config import Phase

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK_EVERY_S = 1.0
"""Looking for a file on a file system that many share costs something."""
LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "the deepspeed launcher"}
"""Variable -> the launcher that sets it, and whose child each rank is. srun's ranks end with Slurm's step."""
LAST_WORDS_S = 10.0
"""So long before a watchdog bites, it has written down what there is to know (at most a tenth of its limit)."""


class StopRequests:
    """Everything that may ask this process to stop: signals, the STOP file, the end of a Slurm job's time, the death of
    its launcher, which leaves its ranks at work where nobody sees them.

    Asking is local; the engine tells all ranks in the same step. Use as a context manager; handlers are put back.
    """

    def __init__(
        self,
        stop_file: Path,
        margin_s: float,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        *,
        looks: bool = True,
    ) -> None:
        """`looks`: whether this process looks for the file, once a second; one is enough."""
        self._stop_file, self._clock = stop_file, clock
        self._looks, self._looked, self._file_seen = looks, -math.inf, False
        end = environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - margin_s if end.isdigit() else None
        self._launcher = next((name for variable, name in LAUNCHERS.items() if variable in environ), None)
        self._parent = os.getppid()
        self._signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return f"got {self._signal}"
        if self._deadline is not None and self._clock() >= self._deadline:
            return "the job's time is nearly over"
        if self._launcher is not None and os.getppid() != self._parent:
            return f"{self._launcher}, the launcher, was killed"
        return f"{self._stop_file} exists" if self._sees_file() else None

    def _sees_file(self) -> bool:
        now = self._clock()
        if self._looks and not self._file_seen and abs(now - self._looked) >= LOOK_EVERY_S:
            self._looked, self._file_seen = now, self._stop_file.exists()
        return self._file_seen


class Watchdog:
    """Ends this process (exit code 1, stacks of all its threads on stderr) when `feed` is not called for too long.

    `limits_s`: how long, in each phase; 0: for ever. A rank that hangs makes the others wait for it, so the watchdogs
    of all ranks bite within moments, and the log shows where each one stood. It works while a thread is stuck in
    foreign code: Python's faulthandler needs no interpreter. `last_words` is called shortly before, by another thread.
    """

    def __init__(self, limits_s: Mapping[Phase, float], last_words: Callable[[], object] | None = None) -> None:
        self.limits_s, self._last_words = limits_s, last_words
        self._deadline = math.inf
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        self.feed("start")
        if self._last_words is not None:
            threading.Thread(target=self._wait_for_the_last, name="mvar-watchdog", daemon=True).start()
        return self

    def feed(self, phase: Phase = "step") -> None:
        """Progress was made; what comes now is `phase`."""
        limit_s = self.limits_s[phase]
        if limit_s:
            faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.stderr)
        else:
            faulthandler.cancel_dump_traceback_later()
        self._deadline = time.monotonic() + limit_s - min(LAST_WORDS_S, limit_s / 10) if limit_s else math.inf

    def _wait_for_the_last(self) -> None:
        assert self._last_words is not None
        while not self._ended.wait(min(1.0, max(0.01, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self._last_words()
                return

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
