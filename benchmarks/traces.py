"""Traces of torch's profiler: taken, and read as plain events."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASE = "phase: "
"""How names of `phase` begin."""
MEASURED, STEP = "measured", "step"
"""Phases: all that counts in a trace, and each of its steps."""
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CALLS = {"cuda_runtime", "cuda_driver"}
ON_HOST = {"cpu_op", "user_annotation"} | CALLS


@dataclass(frozen=True)
class Event:
    """Something that a thread or a stream was busy with."""

    name: str
    category: str
    """The profiler's: "kernel", "gpu_memcpy", "gpu_memset" on a device; "cpu_op", "user_annotation", "cuda_runtime",
    "cuda_driver" on the host."""
    begin: float
    end: float
    lane: str = ""
    """The thread, or the stream."""
    link: int | None = None
    """The same for a kernel and for the call that launched it."""

    @property
    def us(self) -> float:
        return self.end - self.begin


def phase(name: str) -> Any:
    """A range for the trace, as a context manager."""
    return record_function(PHASE + name)


def recorded(run: Callable[[], object], warm_up: Callable[[], object], keep: Path | None = None) -> list[Event]:
    """What happens in `run`, after `warm_up`: the profiler's first launches are slow. `keep`: a file for the trace."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with profile(activities=activities) as profiler:
            warm_up()
            _wait()
            with phase(MEASURED):
                run()
                _wait()
        profiler.export_chrome_trace(str(path))
        return read(path)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read(path: Path) -> list[Event]:
    """The events of a trace that says how long things took, in Chrome's format, of a device and of the host."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        tree = json.loads(file.read(), strict=False)
    events = []
    for found in tree["traceEvents"]:
        if found.get("ph") == "X" and found.get("cat") in ON_HOST | ON_DEVICE:
            about, begin = found.get("args", {}), float(found["ts"])
            lane = str(about.get("stream") if found["cat"] in ON_DEVICE else found["tid"])
            end = begin + float(found.get("dur", 0))
            events.append(Event(found["name"], found["cat"], begin, end, lane, about.get("correlation")))
    return events
