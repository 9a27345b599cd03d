"""Where a GPU waits, from a trace of torch's profiler: what keeps it busy, and what the host does while it is idle.

`python -m benchmarks.idle TRACE.json` reads a trace again that `benchmarks.gpu --traces FOLDER` has kept (.gz too).

A trace holds what `traces.recorded` took: a phase MEASURED, in it a phase STEP for each step, with phases of its own.
Times of events are microseconds; milliseconds and counts in tables are those of one step.
"""

from __future__ import annotations

import argparse
import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.traces import CALLS, MEASURED, ON_DEVICE, ON_HOST, PHASE, STEP, Event, read

NOTHING = "(Python, or nothing)"
QUEUED = "(launched already)"
WAITING = re.compile(r"Synchronize|^cudaMemcpy")
"""Calls in which the host waits for the device."""
KINDS = {
    "collectives": "nccl",
    "attention": "scale_attention|flash|fmha|attention|sdpa",
    "Mamba": r"chunk_scan|chunk_state|state_passing|bmm_chunk|chunk_cumsum|\bssd_|causal_conv|_layer_norm_(fwd|bwd)",
    "fused chains": "residual_norm|qk_norm|gated_norm|group_norm_(parts|affine|apply)|cross_entropy|^triton_",
    "optimizer": "adam|multi_tensor",
    "convolutions": "fprop|dgrad|wgrad|implicit_gemm|convolve|winograd|nchw|nhwc|cudnn",
    "matrix products": "gemm|gemv|cutlass|nvjet|cublas|splitk|matmul",
    "elementwise, sums, copies": "elementwise|reduce|copy|cat|index|fill|scatter|gather|scan|softmax|norm|distribution",
}
"""Kind of kernel -> what its names have; the first that fits, upper and lower case alike."""
COPIES, OTHER = "copies", "other"

Row = dict[str, Any]
Tree = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A stretch of time in which a thread was in the middle of the same things."""

    begin: float
    end: float
    outermost: str = NOTHING
    innermost: str = NOTHING

    @property
    def us(self) -> float:
        return self.end - self.begin


class Timeline:
    """What one thread was in the middle of at each moment."""

    def __init__(self, events: Iterable[Event]) -> None:
        """`events`: nested. One that ends after the one around it is cut."""
        self.spans: list[Span] = []
        self._at = 0.0
        self._around: list[Event] = []
        for event in sorted(events, key=lambda event: (event.begin, -event.end)):
            self._leave(event.begin)
            self._advance(event.begin)
            end = min(event.end, self._around[-1].end) if self._around else event.end
            self._around.append(replace(event, end=end))
        self._leave(math.inf)
        self._ends = [span.end for span in self.spans]

    def _leave(self, until: float) -> None:
        while self._around and self._around[-1].end <= until:
            self._advance(self._around[-1].end)
            self._around.pop()

    def _advance(self, to: float) -> None:
        if self._around and to > self._at:
            self.spans.append(Span(self._at, to, self._around[0].name, self._around[-1].name))
        self._at = to

    def between(self, begin: float, end: float) -> Iterator[Span]:
        """The spans from `begin` to `end`, cut to these, without a hole."""
        for number in range(bisect_right(self._ends, begin), len(self.spans)):
            span = self.spans[number]
            if span.begin >= end:
                break
            if span.begin > begin:
                yield Span(begin, span.begin)
            yield replace(span, begin=max(begin, span.begin), end=min(end, span.end))
            begin = span.end
        if begin < end:
            yield Span(begin, end)


class Sums:
    """Microseconds and how often, by name."""

    def __init__(self) -> None:
        self.us: dict[str, float] = defaultdict(float)
        self.times: dict[str, int] = defaultdict(int)

    def add(self, name: str, us: float, times: int = 1) -> None:
        self.us[name] += us
        self.times[name] += times

    def rows(self, steps: int, most: int | None = None) -> list[Row]:
        """For one step, the largest first; what is left out is one row."""
        ordered = sorted(self.us, key=lambda name: -self.us[name])
        groups = [(name[:120], [name]) for name in ordered[:most]]
        if len(groups) < len(ordered):
            groups.append((f"({len(ordered) - len(groups)} more)", ordered[len(groups) :]))
        return [
            {
                "name": title,
                "ms": _ms(sum(self.us[name] for name in names), steps),
                "times": round(sum(self.times[name] for name in names) / steps, 2),
            }
            for title, names in groups
        ]


@dataclass(frozen=True)
class Gap:
    """The device does nothing, until `ended_by` begins (None: until the end)."""

    begin: float
    end: float
    ended_by: Event | None

    @property
    def us(self) -> float:
        return self.end - self.begin


def kind_of(event: Event) -> str:
    """Of something on a device."""
    if event.category != "kernel":
        return COPIES
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.name, re.IGNORECASE))
    return next(found, OTHER)


def short(name: str) -> str:
    """A kernel's name without what all have."""
    return re.sub(r"^void |\bat::native::|\(anonymous namespace\)::", "", name)[:120]


def gaps(device: Iterable[Event], begin: float, end: float) -> list[Gap]:
    """Where none of the events of any stream lies."""
    found, at = [], begin
    for event in sorted(device, key=lambda event: event.begin):
        if event.begin > at:
            found.append(Gap(at, min(event.begin, end), event))
        at = max(at, event.end)
    return [*found, *([Gap(at, end, None)] if at < end else [])]


class Trace:
    """Events inside the range MEASURED, by what they are."""

    def __init__(self, events: Sequence[Event]) -> None:
        """Raises ValueError where nothing was measured."""
        whole = [event for event in events if event.name == PHASE + MEASURED and event.category == "user_annotation"]
        if not whole:
            raise ValueError(
                f"the trace has no range {PHASE + MEASURED!r}: it is not one of `benchmarks.idle.recorded`"
            )
        self.begin, self.end, self.main = whole[0].begin, whole[0].end, whole[0].lane
        inside = [event for event in events if self.begin <= event.begin < self.end]
        self.device = [event for event in inside if event.category in ON_DEVICE]
        self.calls = [event for event in inside if event.category in CALLS]
        self.launches: dict[int | None, Event] = {call.link: call for call in self.calls if call.link is not None}
        phases = [event for event in inside if event.category == "user_annotation" and event.name.startswith(PHASE)]
        self.steps = max(1, sum(event.name == PHASE + STEP for event in phases))
        self.phases = Timeline(phases)
        threads = defaultdict(list)
        for event in inside:
            if event.category in ON_HOST and not event.name.startswith(PHASE):
                threads[event.lane].append(event)
        self.operations = [event for own in threads.values() for event in own]
        self.threads = {lane: Timeline(own) for lane, own in threads.items()}

    def phases_between(self, begin: float, end: float) -> Iterator[tuple[str, float]]:
        """Name and microseconds of each."""
        for span in self.phases.between(begin, end):
            yield span.innermost.removeprefix(PHASE), span.us

    def host_between(self, begin: float, end: float, thread: str) -> Iterator[tuple[str, Span]]:
        """What a thread did, and the phase."""
        for span in self.threads.get(thread, Timeline([])).between(begin, end):
            for own in self.phases.between(span.begin, span.end):
                yield own.innermost.removeprefix(PHASE), replace(span, begin=own.begin, end=own.end)

    def blamed(self, gap: Gap) -> Iterator[tuple[str, Span]]:
        """The phase, and what the host did, all along a gap: on the thread that launched what ended it. Once that was
        launched, the host is not to blame."""
        launch = self.launches.get(gap.ended_by.link) if gap.ended_by is not None else None
        late = gap.end if launch is None else min(max(launch.end, gap.begin), gap.end)
        yield from self.host_between(gap.begin, late, self.main if launch is None else launch.lane)
        if late < gap.end:
            yield QUEUED, Span(late, gap.end, QUEUED, QUEUED)


def analyse(events: Sequence[Event]) -> Tree:
    """Figures and tables of a trace. Without a device in it those of the host alone. Raises ValueError.

    `busy_ms`: some stream has something to do. `idle_ms`: none has; of it `late_ms` until the host had launched what
    came next. `blocked_ms`: the host waits for the device. `launch_us`: of a call that launches kernels; `host_us`: the
    host's time without waiting, for each of these calls.
    """
    trace = Trace(events)
    phases, blocked, operations = Sums(), Sums(), Sums()
    for name, us in trace.phases_between(trace.begin, trace.end):
        phases.add(name, us)
    for call in trace.calls:
        if WAITING.search(call.name):
            for name, us in trace.phases_between(call.begin, call.end):
                blocked.add(name, us)
    for event in trace.operations:
        operations.add(event.name, 0)
    for timeline in trace.threads.values():
        for span in timeline.spans:
            operations.add(span.innermost, span.end - span.begin, times=0)
    tree = {
        "steps": trace.steps,
        "step_ms": _ms(trace.end - trace.begin, trace.steps),
        "host_phases": [
            row | {"blocked_ms": _ms(blocked.us.get(row["name"], 0), trace.steps)} for row in phases.rows(trace.steps)
        ],
        "host_operations": operations.rows(trace.steps, 20),
    }
    if trace.device:
        in_steps_us, waiting_us = (
            sum(us for name, us in sums.us.items() if name != MEASURED) for sums in (phases, blocked)
        )
        tree["blocked_ms"] = _ms(waiting_us, trace.steps)
        tree |= _launched(trace, in_steps_us - waiting_us) | _waits(trace) | _kernels(trace)
    return tree


def _launched(trace: Trace, host_us: float) -> Tree:
    links = {event.link for event in trace.device if event.category == "kernel"} & trace.launches.keys()
    count = max(1, len(links))
    return {
        "kernels": len(trace.device) / trace.steps,
        "launches": len(links) / trace.steps,
        "launch_us": round(sum(trace.launches[link].us for link in links) / count, 3),
        "host_us": round(host_us / count, 3),
    }


def _waits(trace: Trace) -> Tree:
    found = gaps(trace.device, trace.begin, trace.end)
    by_phase, by_outermost, by_innermost = Sums(), Sums(), Sums()
    longest: list[Row] = []
    for gap in found:
        parts = list(trace.blamed(gap))
        for name, span in parts:
            by_phase.add(name, span.us)
            by_outermost.add(f"{name}: {span.outermost}", span.us)
            by_innermost.add(f"{name}: {span.innermost}", span.us)
        name, span = max(parts, key=lambda part: part[1].us)
        longest.append(
            {
                "ms": _ms(gap.us, 1),
                "at_ms": _ms(gap.begin - trace.begin, 1),
                "phase": name,
                "outermost": span.outermost,
                "innermost": span.innermost,
                "before": short(gap.ended_by.name) if gap.ended_by is not None else "the end",
            }
        )
    idle_us, queued_us = sum(gap.us for gap in found), by_phase.us.get(QUEUED, 0)
    return {
        "busy_ms": _ms(trace.end - trace.begin - idle_us, trace.steps),
        "idle_ms": _ms(idle_us, trace.steps),
        "late_ms": _ms(idle_us - queued_us, trace.steps),
        "idle_phases": by_phase.rows(trace.steps),
        "idle_outermost": by_outermost.rows(trace.steps, 15),
        "idle_innermost": by_innermost.rows(trace.steps, 15),
        "longest_waits": sorted(longest, key=lambda row: -row["ms"])[:15],
    }


def _kernels(trace: Trace) -> Tree:
    kinds, names = Sums(), Sums()
    for event in trace.device:
        kinds.add(kind_of(event), event.us)
        names.add(short(event.name), event.us)
    return {"kinds": kinds.rows(trace.steps), "largest_kernels": names.rows(trace.steps, 25)}


def _ms(us: float, steps: int) -> float:
    return round(us / 1e3 / steps, 4)


TITLES = {
    "kinds": "kernels by kind",
    "largest_kernels": "largest kernels",
    "idle_phases": "the device waits, by what the host is in",
    "idle_outermost": "the device waits, by the host's outermost operation",
    "idle_innermost": "the device waits, by the host's innermost operation",
    "host_phases": "the host, by what it is in",
    "host_operations": "the host's operations, own time",
}


def lines(tree: Tree) -> Iterator[str]:
    """What `analyse` found, for people."""
    if "busy_ms" in tree:
        yield "{steps} steps of {step_ms:.2f} ms under the profiler: the device is busy for {busy_ms:.2f} ms".format(
            **tree
        )
        yield "it waits for {idle_ms:.2f} ms, {late_ms:.2f} of it until the host launches what comes next".format(
            **tree
        )
        yield "{kernels:.0f} kernels and copies a step; {launches:.0f} calls launch kernels".format(**tree)
        yield "such a call takes {launch_us:.1f} us, the host {host_us:.1f} us for each in all".format(**tree)
        yield "the host waits for the device for {blocked_ms:.2f} ms".format(**tree)
    else:
        yield f"{tree['steps']} steps of {tree['step_ms']:.2f} ms under the profiler; the trace has no device in it"
    for key, title in TITLES.items():
        if key in tree:
            yield f"{title}, ms and how often a step"
            for row in tree[key]:
                waits = f"; waits for the device for {row['blocked_ms']:.2f}" if row.get("blocked_ms") else ""
                yield f"  {row['ms']:10.3f} {row['times']:7.0f} x  {row['name'][:96]}{waits}"
    if "longest_waits" in tree:
        yield "the device's longest waits, ms"
        for row in tree["longest_waits"]:
            doing = " > ".join(dict.fromkeys([row["phase"], row["outermost"], row["innermost"]]))
            yield f"  {row['ms']:10.3f}  {doing[:96]}; then {row['before'][:40]}"


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("trace", type=Path, help="a trace that was kept")
    print("\n".join(lines(analyse(read(options.parse_args(argv).trace)))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
