"""RUN/strikes.jsonl: machines that a training found wanting, with the evidence.

One JSON object a line: time (Unix seconds), step (None: before the first), rank, node, device, what, evidence, and of
Slurm job and restarts. `out`: proof that leaves the node out of the run at once; the others count towards
MVAR_NODE_STRIKES, once for each start of a job (see mvar.cluster.chain). Needs neither torch nor Slurm.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mvar.files import json_lines
from mvar.log import log
from mvar.run.history import job_name

NAME = "strikes.jsonl"


@dataclass(frozen=True)
class Strike:
    """Something that speaks against a machine."""

    time: float
    step: int | None
    rank: int
    node: str
    """As Slurm calls it; elsewhere the host."""
    device: str
    what: str
    evidence: str
    out: bool
    job: str | None
    restarts: int

    def __str__(self) -> str:
        when = "" if self.step is None else f" at step {self.step}"
        return f"{self.node}: rank {self.rank} ({self.device}){when}: {self.what}: {self.evidence}"


def note(
    run: Path,
    *,
    step: int | None,
    rank: int,
    node: str,
    device: str,
    what: str,
    evidence: str,
    out: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Strike:
    """Write one down, and say it."""
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    strike = Strike(time.time(), step, rank, node, device, what, evidence, out, job_name(environ), restarts)
    log.warning("%s", strike)
    try:
        json_lines.append(run / NAME, asdict(strike))
    except OSError as error:  # A full disk: no reason to end a training.
        log.warning("%s: %s; not noted.", run / NAME, error)
    return strike


def read(run: Path) -> list[Strike]:
    """All strikes, oldest first. Lines that are torn, or another version's, are passed over."""
    found = []
    for record in json_lines.read(run / NAME):
        with contextlib.suppress(TypeError):
            found.append(Strike(**record))
    return found


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """What Slurm calls this machine, or its host name."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()
