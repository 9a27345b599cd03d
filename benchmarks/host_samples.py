"""Where Python spends a program's time: a look at the stacks of its threads, a thousand times a second.

A profiler that is told of every call makes short functions look long; looks from another thread cost all alike.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

OWN = str(Path(__file__).resolve().parent)
MAIN, AUTOGRAD = "main", "autograd"
Stack = tuple[tuple[str, int], ...]
"""Function and line, the innermost first."""


class HostSamples:
    """Looks at the main thread, and at those that Python did not start (autograd's), while it is entered."""

    def __init__(self, every_s: float = 1e-3) -> None:
        self.taken = 0
        self.seconds = 0.0
        self._every_s = every_s
        self._stacks: Counter[tuple[str, Stack]] = Counter()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="mvar-host-samples", daemon=True)

    def __enter__(self) -> HostSamples:
        self._before_s = sys.getswitchinterval()
        sys.setswitchinterval(self._every_s / 2)
        self._began_s = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began_s
        sys.setswitchinterval(self._before_s)

    def _look(self) -> None:
        main = threading.main_thread().ident
        while not self._ended.wait(self._every_s):
            started = {
                thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
            }
            self.taken += 1
            for number, frame in sys._current_frames().items():
                if number == main or number not in started:
                    self._stacks[MAIN if number == main else AUTOGRAD, _stack(frame)] += 1

    def tables(self, most: int = 40) -> dict[str, list[dict[str, Any]]]:
        """Functions by the share of the looks that found them somewhere on a stack, and lines by those innermost."""
        within: Counter[tuple[str, str]] = Counter()
        own: Counter[tuple[str, str]] = Counter()
        for (side, stack), times in self._stacks.items():
            for function in {function for function, _ in stack}:
                within[side, function] += times
            if stack:
                own[side, f"{stack[0][0]}:{stack[0][1]}"] += times
        return {
            name: [
                {"thread": side, "where": where, "share": round(times / max(1, self.taken), 4)}
                for (side, where), times in counted.most_common(most)
            ]
            for name, counted in (("host_functions", within), ("host_lines", own))
        }


def _stack(frame: FrameType | None) -> Stack:
    """Without the benchmark's own frames."""
    found = []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith((OWN, "<frozen")):
            place = "/".join(Path(code.co_filename).parts[-3:])
            found.append((f"{place}:{getattr(code, 'co_qualname', code.co_name)}", frame.f_lineno))
        frame = frame.f_back
    return tuple(found)
