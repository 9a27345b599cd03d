"""RUN/history.jsonl: every start of a training run, and how it ended.

The losses of a run are in metrics.jsonl, which a resumed run cuts back to where it goes on; nothing is ever cut here.
One JSON object a line, all with `event` and `time` (Unix seconds):

    start      pid, host, world, and of Slurm: job, restarts, nodes, allocated (when the job began);
               last_sign (when the process before last wrote a measurement: the end of a killed one)
    environment  versions, system, device, commit, uncommitted_changes: what the start ran on, from which code
    going_on   step: the checkpoint was taken up (0: the run began)
    first_step step, seconds (of each part of the start): its first step is done
    end        code, step, reason: the process ended by itself
    spike      step, reason, worst_samples (those of highest loss): a loss or gradient far above the usual
    skipped    step, reason, bad_samples (those whose loss was not finite): no update was made
    went_back  first, last (the bad steps), step (where training went on), samples (images that were left out)

A step that a restart does again may be noted again. A start without an end was killed. Needs neither torch nor Slurm.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvar.errors import EXIT_FAULT, EXIT_USER_ERROR, MvarError
from mvar.files import json_lines
from mvar.log import log
from mvar.run.environment import environment

NAME = "history.jsonl"


TROUBLES = ("spike", "skipped", "went_back")
NAMED = 64
"""Samples that a record of trouble names, at most."""


@dataclass(frozen=True)
class Trouble:
    """A bad step, or what was done about several."""

    event: str
    time: float
    """Unix seconds."""
    step: int
    """Steps done."""
    reason: str
    samples: tuple[int, ...] = ()
    """Numbers in the train split."""


@dataclass(frozen=True)
class Start:
    """One start of the run."""

    time: float
    """Unix seconds."""
    world: int
    pid: int
    host: str
    job: str | None
    """Slurm's job id; `array_task` for a member of an array."""
    restarts: int
    """How often Slurm had requeued the job."""
    nodes: str | None
    allocated: float | None
    """When the job got its nodes, Unix seconds."""
    last_sign: float | None = None
    """When metrics.jsonl had last been written to, Unix seconds: a killed start before this one lived until then."""
    begin_step: int | None = None
    """Steps done when training went on; None if it never got so far."""
    end_time: float | None = None
    """None: killed, or still running."""
    end_step: int | None = None
    code: int | None = None
    reason: str = ""


class History:
    """The file of one run. Only the process that holds the run folder writes: others say `writes=False`."""

    def __init__(self, run: Path, *, writes: bool = True) -> None:
        self.path = run / NAME
        self._writes = writes

    @contextmanager
    def recording(self, world: int) -> Iterator[History]:
        """From a start to its end. An error that passes is the end's reason; other ends are told through `end`."""
        self.start(world)
        try:
            yield self
        except BaseException as error:
            expected = isinstance(error, MvarError) or getattr(error, "expected", False)
            self.end(
                EXIT_USER_ERROR if expected else EXIT_FAULT, None, f"{type(error).__name__}: {error}".splitlines()[0]
            )
            raise

    def start(self, world: int, environ: Mapping[str, str] = os.environ) -> None:
        began = environ.get("SLURM_JOB_START_TIME", "")
        self._write(
            "start",
            pid=os.getpid(),
            host=socket.gethostname(),
            world=world,
            job=job_name(environ),
            restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
            nodes=environ.get("SLURM_JOB_NODELIST"),
            allocated=float(began) if began.isdigit() else None,
            last_sign=self._last_measurement(),
        )

    def _last_measurement(self) -> float | None:
        try:
            return self.path.with_name("metrics.jsonl").stat().st_mtime
        except FileNotFoundError:
            return None

    def runs_on(self, device: str) -> None:
        """`device`: what the ranks compute on, in words. Asks git, which takes a moment."""
        if self._writes:
            self._write("environment", **environment(device))

    def environment(self) -> dict[str, Any]:
        """What the newest start ran on; empty where none said."""
        found: dict[str, Any] = {}
        for event in json_lines.read(self.path):
            if event.get("event") == "environment":
                found = {key: value for key, value in event.items() if key not in ("event", "time")}
        return found

    def going_on(self, step: int) -> None:
        self._write("going_on", step=step)

    def first_step(self, step: int, parts_s: Mapping[str, float]) -> None:
        self._write("first_step", step=step, seconds=dict(parts_s))

    def end(self, code: int, step: int | None, reason: str) -> None:
        self._write("end", code=code, step=step, reason=reason)

    def spike(self, step: int, reason: str, worst: Sequence[int]) -> None:
        self._write("spike", step=step, reason=reason, worst_samples=list(worst))

    def skipped(self, step: int, reason: str, bad: Sequence[int]) -> None:
        self._write("skipped", step=step, reason=reason, bad_samples=list(bad[:NAMED]))

    def went_back(self, first: int, last: int, step: int, samples: int) -> None:
        self._write("went_back", first=first, last=last, step=step, samples=samples)

    def troubles(self) -> list[Trouble]:
        """All bad steps that are known of, oldest first, also those that were undone."""
        found = []
        for event in json_lines.read(self.path):
            kind = event.get("event")
            if kind in TROUBLES:
                reason = event.get("reason") or (
                    f"steps {event['first']} to {event['last']} were bad; {event['samples']:,} images are left out"
                )
                named = event.get("worst_samples") or event.get("bad_samples") or ()
                found.append(Trouble(str(kind), event["time"], event["step"], reason, tuple(named)))
        return found

    def _write(self, event: str, **values: Any) -> None:
        if not self._writes:
            return
        entry = {"event": event, "time": time.time()} | values
        try:
            json_lines.append(self.path, entry)
        except OSError as error:  # A full disk: no reason to end a training.
            log.warning("%s: %s; not noted: %s", self.path, error, entry)

    def starts(self) -> list[Start]:
        """All starts, oldest first. Lines torn by a kill are passed over."""
        found: list[Start] = []
        for event in json_lines.read(self.path):
            kind = event.pop("event", None)
            if kind == "start":
                found.append(Start(**event))
            elif kind == "going_on" and found:
                found[-1] = _with(found[-1], begin_step=event["step"])
            elif kind == "end" and found:
                ended = {"end_time": event["time"], "end_step": event["step"]}
                found[-1] = _with(found[-1], **ended, code=event["code"], reason=event["reason"])
        return found


def job_name(environ: Mapping[str, str]) -> str | None:
    """This process's Slurm job as Slurm's commands take it: `array_task`, or the id; None outside of one."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID")


def _with(start: Start, **changes: Any) -> Start:
    return Start(**(vars(start) | changes))
