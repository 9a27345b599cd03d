"""What follows on one start of a Slurm job of a chain, and which nodes are to blame: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mvar.errors import EXIT_FINISHED, EXIT_STOPPED, EXIT_USER_ERROR, ConfigError
from mvar.run.history import job_name
from mvar.run.strikes import Strike

NO_FAULTS = (EXIT_FINISHED, EXIT_STOPPED, EXIT_USER_ERROR)
"""Exit codes of a training that nothing went wrong with but its use."""
Action = Literal["finished", "next", "requeue", "stop"]


@dataclass(frozen=True)
class Limits:
    """When to give up. Each can be set by an environment variable."""

    restarts: int = 50
    """MVAR_MAX_RESTARTS: how often Slurm may requeue one job of the chain."""
    fruitless: int = 5
    """MVAR_MAX_FRUITLESS: failed starts in a row without a new checkpoint, then the chain stops."""
    strikes: int = 3
    """MVAR_NODE_STRIKES: failures of a node, then it is excluded."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Limits:
        return cls(
            restarts=int(environ.get("MVAR_MAX_RESTARTS") or cls.restarts),
            fruitless=int(environ.get("MVAR_MAX_FRUITLESS") or cls.fruitless),
            strikes=int(environ.get("MVAR_NODE_STRIKES") or cls.strikes),
        )


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job that this process is part of."""

    name: str
    """As Slurm's commands take it: `array_task`, or the id."""
    chain: str
    """The id that all tasks of the array have in common."""
    restarts: int
    nodes: tuple[str, ...]
    is_array: bool
    is_last: bool

    @classmethod
    def of(cls, environ: Mapping[str, str], nodes: Sequence[str]) -> SlurmJob:
        """Raises ConfigError outside of a job."""
        name = job_name(environ)
        if name is None:
            raise ConfigError("no SLURM_JOB_ID in the environment: this command is for jobs, see slurm/train.sbatch.")
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        return cls(
            name=name,
            chain=array or environ["SLURM_JOB_ID"],
            restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
            nodes=tuple(nodes),
            is_array=array is not None,
            is_last=task == environ.get("SLURM_ARRAY_TASK_MAX"),
        )

    def is_start(self, attempt: Attempt) -> bool:
        return (attempt.job, attempt.restarts) == (self.name, self.restarts)


@dataclass(frozen=True)
class Blame:
    """Nodes that failed, and the lines that say so."""

    nodes: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()

    def __add__(self, other: Blame) -> Blame:
        return Blame(tuple(sorted({*self.nodes, *other.nodes})), self.evidence + other.evidence)


@dataclass(frozen=True)
class Attempt:
    """One start of a job of a chain."""

    job: str
    chain: str
    restarts: int
    nodes: tuple[str, ...]
    time: float
    """When it began, Unix seconds."""
    step: int
    """Steps of the newest checkpoint when it began."""
    saved: int | None = None
    """The same when it ended; None while it runs, or if it was killed and nobody has looked since."""
    code: int | None = None
    """Exit code of srun; None if the job was killed."""
    action: str = ""
    blamed: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self.saved is not None

    @property
    def fruitless(self) -> bool:
        """Whether it failed without a new checkpoint."""
        return self.ended and self.code not in NO_FAULTS and (self.saved or 0) <= self.step


@dataclass(frozen=True)
class Decision:
    action: Action
    message: str
    code: int
    """Exit code of the job."""


def decide(
    code: int | None, job: SlurmJob, attempts: Sequence[Attempt], limits: Limits, *, preempted: bool, reason: str
) -> Decision:
    """What follows on a start of `job` that ended with `code` (None: killed). `attempts`: those of this chain, the
    one that ended included. `reason`: why `mvar train` stopped, in its words."""
    again = job.restarts < limits.restarts
    if code == EXIT_FINISHED:
        return Decision("finished", "the run is finished; what is left of the chain is cancelled.", 0)
    if code == EXIT_USER_ERROR:
        return Decision("stop", "wrong use (see above): the chain ends here. Mend it and submit again.", code)
    if code == EXIT_STOPPED:
        if reason.endswith("STOP exists"):
            return Decision("stop", "stopped by the STOP file: the chain ends here. Submit again to go on.", 0)
        if preempted and again:
            return Decision("requeue", "preempted, with a checkpoint saved: requeued.", 0)
        why = f"saved and stopped ({reason or 'asked to'})"
        if not job.is_array or (job.is_last and not preempted):
            return Decision("next", f"{why}; no further job of this chain waits. Submit again to go on.", 0)
        return Decision("next", f"{why}; the next task of the array goes on.", 0)

    fault = "killed" if code is None else f"failed with exit code {code}"
    fruitless = 0
    for attempt in reversed(attempts):
        if not attempt.fruitless:
            break
        fruitless += 1
    if fruitless >= limits.fruitless:
        return Decision(
            "stop",
            f"{fault}, and {fruitless} starts in a row brought no new checkpoint: the chain ends here instead of"
            " burning the allocation. Look at the logs named above, mend the cause, submit again.",
            code or 1,
        )
    if again:
        return Decision("requeue", f"{fault}: requeued (start {job.restarts + 2} of this job).", code or 1)
    return Decision("next", f"{fault}, after {job.restarts} restarts: left to the next task of the array.", code or 1)


TASK = re.compile(r"srun: error: (?P<nodes>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.*)")
NODE = re.compile(r"Node failure on (?P<nodes>\S+)")


def blame(log: str, nodes: Sequence[str], code: int | None) -> Blame:
    """Which of a failed start's nodes is to blame, from what srun said on stderr.

    A node that Slurm lost is. Else a task that died of a signal before srun began to end the others points at its node;
    one that failed with an exit code does so only if the tasks of other nodes did not fail alike: then the program is.
    """
    if code in NO_FAULTS:
        return Blame()
    lines = log.splitlines()
    found = [(expand(m["nodes"]), line) for line in lines if (m := NODE.search(line))]
    if not found:
        ends = [(place, m) for place, line in enumerate(lines) if (m := TASK.search(line))]
        stopping = (place for place, line in enumerate(lines) if "Terminating" in line or "aborted" in line)
        by_themselves = next(stopping, len(lines))
        for place, own in ends:
            alike = {node for _, other in ends if other["how"] == own["how"] for node in expand(other["nodes"])}
            if place < by_themselves and (len(alike) == 1 or not own["how"].startswith("Exited")):
                found.append((expand(own["nodes"]), lines[place]))
    named = {name for names, _ in found for name in names} & {*nodes}
    if len(named) == len(nodes) > 1:
        return Blame()  # All of them at once: no node's fault.
    return Blame(tuple(sorted(named)), tuple(line for _, line in found if named))


def expand(names: str) -> tuple[str, ...]:
    """Slurm's `n[1-3,07],m` as single names."""
    found: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*),?", names):
        if not ranges:
            found.append(prefix)
        for part in filter(None, ranges.split(",")):
            low, _, high = part.partition("-")
            found += [f"{prefix}{n:0{len(low)}}{suffix}" for n in range(int(low), int(high or low) + 1)]
    return tuple(found)


def strikes(attempts: Sequence[Attempt], found: Iterable[Strike] = ()) -> dict[str, int]:
    """How often each node was to blame: once in each start, and once in each other job that found something."""
    starts = {(attempt.job, attempt.restarts) for attempt in attempts}
    others = {(one.node, one.job, one.restarts) for one in found if (one.job, one.restarts) not in starts}
    counts: dict[str, int] = {}
    for node in [*(node for attempt in attempts for node in attempt.blamed), *(node for node, *_ in others)]:
        counts[node] = counts.get(node, 0) + 1
    return counts
