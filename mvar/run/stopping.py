"""When a run stops: what may ask it to, and what ends one that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Everything that may ask this process to stop: signals, the STOP file, the end of a Slurm job's time.

    Asking is local; the engine tells all ranks in the same step. Use as a context manager; handlers are put back.
    """

    def __init__(
        self,
        stop_file: Path,
        margin_s: float,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stop_file, self._clock = stop_file, clock
        end = environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - margin_s if end.isdigit() else None
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
        if self._stop_file.exists():
            return f"{self._stop_file} exists"
        return None


class Watchdog:
    """Ends this process (exit code 1, stacks of all its threads on stderr) when `feed` is not called for `limit_s`.

    A rank that hangs makes the others wait for it, so the watchdogs of all ranks bite within moments, and the log shows
    where each one stood. It works while a thread is stuck in foreign code: Python's faulthandler needs no interpreter.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def __enter__(self) -> Watchdog:
        self.feed()
        return self

    def feed(self) -> None:
        if self._limit_s:
            faulthandler.dump_traceback_later(self._limit_s, exit=True, file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
