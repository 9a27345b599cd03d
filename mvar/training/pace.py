"""How fast each rank computes: the step of all of them takes as long as the slowest one's.

Measured are the forward passes of a step, in which no rank waits for another under ZeRO 0 to 2. Under ZeRO 3 ranks
gather weights of each other in every layer, so a slow one makes all take as long as it does, and nobody is behind.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

LEAST_BEHIND_S = 0.01
"""A rank that is behind by less is no slow machine: what the host has to do beside may take that long."""


class DeviceTimer:
    """Seconds that a device was busy with what is launched inside `with`, all blocks together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def seconds(self) -> float:
        """Waits for the device, if it is not done with the last block."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device.type != "cuda":
            return float(sum(end - begin for begin, end in pairs))
        pairs[-1][1].synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1e3


@dataclass(frozen=True)
class Spread:
    """How long ranks take, seconds."""

    slowest_rank: int
    slowest_s: float
    median_s: float

    @classmethod
    def of(cls, seconds_R: list[float]) -> Spread:
        """The median is a rank's own time, of two in the middle the lower: of two ranks the faster one's."""
        slowest = max(range(len(seconds_R)), key=lambda rank: seconds_R[rank])
        return cls(slowest, seconds_R[slowest], statistics.median_low(seconds_R))


class Pace:
    """Ranks that stay behind in one start of a training."""

    def __init__(self, factor: float, steps: int) -> None:
        """A rank is behind whose median over `steps` steps is more than `factor` times that of the median rank (0: none
        is)."""
        self._factor = factor
        self._recent: deque[list[float]] = deque(maxlen=steps)
        self._told: set[int] = set()

    def behind(self, seconds_R: list[float]) -> list[tuple[int, str]]:
        """After a step: the ranks that are behind and were not before, with the evidence."""
        self._recent.append(seconds_R)
        full = len(self._recent) == self._recent.maxlen
        if not self._factor or not full or len(seconds_R) == 1:
            return []
        usual_R = [statistics.median(times) for times in zip(*self._recent, strict=True)]
        self._recent.clear()
        median_s = statistics.median_low(usual_R)
        found = []
        for rank, usual_s in enumerate(usual_R):
            if usual_s > max(self._factor * median_s, median_s + LEAST_BEHIND_S) and rank not in self._told:
                self._told.add(rank)
                found.append(
                    (rank, f"{usual_s:.3g} s for a step's forward passes, the median rank takes {median_s:.3g} s")
                )
        return found
