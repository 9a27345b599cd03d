"""Who we are among the processes of a run, as our launcher says.

Works under torchrun, under srun with one task per GPU (or per CPU process), under the `deepspeed` launcher, and alone.
Also under one torchrun per node that srun started. What makes no sense is an error before anything waits for a process
that will never come.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from mvar.errors import ConfigError

_INTERACTIVE_STEP = 0xFFFF_FFF0
"""Slurm's special steps (batch shell, interactive shell) have numbers from here on: no launch by srun."""


@dataclass(frozen=True)
class Place:
    """Where a process stands, as its launcher says."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""
    local_size: int = 1
    address: str | None = None
    """Host and port where the processes meet; None alone."""
    port: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or not 0 <= self.local_rank < self.local_size:
            raise ConfigError(
                f"{self.launcher}: got rank {self.rank} of {self.size}, local rank {self.local_rank} of"
                f" {self.local_size}; ranks count from 0. Unset RANK, WORLD_SIZE, LOCAL_RANK to run one process."
            )


def detect(environ: Mapping[str, str]) -> Place:
    """Read the launcher's variables. Raises ConfigError where they are incomplete or contradict each other."""
    named = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environ]
    in_step = "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_ID", _INTERACTIVE_STEP) < _INTERACTIVE_STEP
    if len(named) == 3:
        if in_step:
            _check_nesting(environ)
        return _from_torchrun(environ)
    if named:
        raise ConfigError(
            f"the environment sets {' and '.join(named)} but not all of RANK, WORLD_SIZE, LOCAL_RANK."
            " Start with torchrun, srun or the deepspeed launcher, which set all of them, or unset them."
        )
    return _from_srun(environ) if in_step else Place("alone")


def _check_nesting(environ: Mapping[str, str]) -> None:
    """RANK and its kin in a step of srun: fine where they describe one world that covers the step's tasks."""
    tasks, node = _step_tasks(environ), _number(environ, "SLURM_NODEID", 0)
    size, rank = _number(environ, "WORLD_SIZE"), _number(environ, "RANK")
    here = _tasks_of_nodes(environ)[node : node + 1] or [1]
    if "TORCHELASTIC_RUN_ID" in environ:
        launchers = _number(environ, "GROUP_WORLD_SIZE", 1)
        if launchers != tasks or here[0] > 1:
            raise ConfigError(
                f"torchrun and srun are mixed: srun started {tasks} tasks ({here[0]} on this node), torchrun speaks of"
                f" {launchers} nodes: several worlds would train one run. Use one of them:"
                " `srun --ntasks-per-node=GPUS python -m mvar.train ...` without torchrun, or"
                f" `srun --ntasks-per-node=1 torchrun --nnodes={len(_tasks_of_nodes(environ)) or 1}"
                " --rdzv-backend=c10d ...`. Start no srun inside torchrun."
            )
    elif tasks > 1 and (size, rank) != (tasks, _number(environ, "SLURM_PROCID")):
        raise ConfigError(
            f"the environment says rank {rank} of {size}, srun says {environ['SLURM_PROCID']} of {tasks}. Unset RANK,"
            " WORLD_SIZE and LOCAL_RANK: srun alone is enough."
        )


def _from_torchrun(environ: Mapping[str, str]) -> Place:
    size = _number(environ, "WORLD_SIZE")
    local_rank = _number(environ, "LOCAL_RANK")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", max(size, local_rank + 1)))
    if size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise ConfigError(f"WORLD_SIZE is {size}, but MASTER_ADDR and MASTER_PORT do not say where they meet.")
    first = _number(environ, "RANK") - local_rank
    told = "LOCAL_WORLD_SIZE" in environ or "LOCAL_SIZE" in environ
    if told and first + local_rank < size and not 0 <= first <= size - local_size:
        raise ConfigError(
            f"RANK {environ['RANK']} of {size} with LOCAL_RANK {local_rank} of {local_size}: the ranks of a machine"
            " must follow each other. Let torchrun, srun or the deepspeed launcher set these variables."
        )
    return Place(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environ else "environment",
        rank=_number(environ, "RANK"),
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=environ.get("MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT", 0) or None,
    )


def _from_srun(environ: Mapping[str, str]) -> Place:
    node, rank, local_rank = (_number(environ, f"SLURM_{name}", 0) for name in ("NODEID", "PROCID", "LOCALID"))
    tasks = _tasks_of_nodes(environ)
    if node < len(tasks) and rank != sum(tasks[:node]) + local_rank:
        raise ConfigError(
            f"srun: task {rank} is number {local_rank} of node {node}, but the tasks of a node must follow each other"
            f" (tasks per node: {', '.join(map(str, tasks))}). Add --distribution=block to srun."
        )
    job = _number(environ, "SLURM_JOB_ID", 0) + _number(environ, "SLURM_STEP_ID", 0)
    return Place(
        launcher="srun",
        rank=rank,
        size=_step_tasks(environ),
        local_rank=local_rank,
        local_size=tasks[node] if node < len(tasks) else 1,
        address=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # Nodes of a cluster may share ports with other jobs: one port per job and step.
        port=_number(environ, "MASTER_PORT", 20000 + job % 20000),
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}: got {text!r}, expected a number.") from None


def _step_tasks(environ: Mapping[str, str]) -> int:
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _tasks_of_nodes(environ: Mapping[str, str]) -> list[int]:
    """Tasks on each node of the step, from Slurm's `2(x3),1`; empty where it does not say."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts


def require_one_task_per_gpu(place: Place, environ: Mapping[str, str]) -> None:
    """Under srun, as many tasks on this node as the job has GPUs there. Raises ConfigError otherwise."""
    listed = environ.get("SLURM_STEP_GPUS", "")
    gpus = len(listed.split(",")) if listed else _number(environ, "SLURM_GPUS_ON_NODE", 0)
    if place.launcher == "srun" and gpus and place.local_size != gpus:
        more = "tasks than GPUs" if place.local_size > gpus else "GPUs than tasks, and some would stay idle"
        raise ConfigError(
            f"srun: {place.local_size} tasks on this node, which has {gpus} GPUs for them: more {more}."
            f" Start one task per GPU: --ntasks-per-node={gpus} (or ask for {place.local_size} GPUs a node)."
        )


def require_address(place: Place, tries: int = 3) -> None:
    """Raises ConfigError if the host where the processes meet has no address. A name server may fail now and then."""
    for attempt in range(tries):
        try:
            socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)
            return
        except OSError as error:
            problem = error
        if attempt + 1 < tries:
            time.sleep(1)
    raise ConfigError(
        f"{place.launcher}: host {place.address!r}, where the processes meet, has no address here"
        f" ({problem.strerror or problem}). Set MASTER_ADDR to a name or an IP address of the first node."
    )


def first_host(nodes: str) -> str:
    """First host of Slurm's list, such as `gpu[003-007,9]-ib,login1` -> `gpu003-ib`."""
    match = re.match(r"([^\[,]*)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None  # The pattern matches the empty string too.
    return match[1] + (match[2] or "") + (match[3] or "")
