"""A real Slurm cluster of virtual nodes on this machine, and what tests do with it.

tests/slurm/cluster/start.sh starts slurmctld and one slurmd per node; every node has its own host name, pids and shared
memory. Nothing here is simulated but GPUs (device files) and the size of the nodes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PATIENCE_S = 240
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "setsid")


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "a cluster of virtual nodes needs root"
    alone = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces for virtual nodes here: {alone.stderr.strip()}" if alone.returncode else ""


class Cluster:
    """A running cluster. `folder` holds its configuration, state and logs."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environ |= {
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "MVAR_HOME": str(ROOT),
            "MVAR_PYTHON": sys.executable,
            "MVAR_SITE": str(folder / "site.env"),
            "MVAR_DOCTOR": "off",  # Where its seconds would only cost time; a test of its own has it on.
            "MVAR_NODE_CHECK": "off",  # Likewise.
            "OMP_NUM_THREADS": "1",
            "NODES": str(nodes),
            "PORT": str(free_ports(nodes + 1)),
            "QUICKFAIL": "1",
            "GRACE": "15",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        """Start what does not run: the whole cluster, or a killed node."""
        script = [str(HERE / "cluster" / "start.sh"), str(self.folder)]
        done = subprocess.run(script, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"

    def stop(self) -> None:
        subprocess.run([str(HERE / "cluster" / "stop.sh"), str(self.folder)], env=self.environ, check=True)

    def pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def power_cut(self, node: str) -> None:
        """Kill a node with everything that runs on it."""
        os.kill(self.pid(node), signal.SIGKILL)

    def kill_controller(self) -> None:
        pid = self.pid("slurmctld")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}/exe").exists() or not os.access(f"/proc/{pid}/exe", os.R_OK))

    def run(self, *words: object, cwd: Path | None = None, expect: int = 0, **environ: str) -> str:
        """What a command prints, on both streams; its exit code must be `expect`."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environ | environ,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == expect, f"{words}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def sbatch(self, *words: object, cwd: Path, **environ: str) -> str:
        """Submit; returns the job's id."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **environ).strip().splitlines()[-1]

    def states(self, job: str) -> dict[str, str]:
        """Name (`array_task` for tasks) -> state, of a job or all tasks of an array, those that have ended included."""
        states = {}
        for line in self.run("scontrol", "-o", "show", "job", job).splitlines():
            fields = dict(re.findall(r"\b(JobId|ArrayJobId|ArrayTaskId|JobState|Restarts)=(\S+)", line))
            name = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else fields["JobId"]
            states[name] = fields["JobState"]
        return states

    def field(self, job: str, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.run("scontrol", "-o", "show", "job", job))
        assert found is not None
        return found[1]

    def wait(self, *jobs: str, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait until all of the jobs and their tasks have ended; returns their states."""
        living = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}

        def states() -> dict[str, str]:
            return {name: state for job in jobs for name, state in self.states(job).items()}

        until(lambda: not living & set(states().values()), patience_s, lambda: f"{states()}\n{self.tail()}")
        return states()

    def idle(self) -> None:
        """Wait until no job is left and every node is ready for the next."""
        self.run("scancel", "--user=root")
        ready = {"idle"}
        until(lambda: set(self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split()) == ready, 90, self.tail)

    def tail(self) -> str:
        queue = self.run("squeue") + self.run("sinfo", "-N")
        return queue + "".join(self.run("tail", "-n", "15", log) for log in (self.folder / "log").glob("slurmctld.log"))


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    for first in range(16817, 20000, 50):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return first
            except OSError:
                continue
    raise AssertionError("no free ports")


def until(
    true: Callable[[], bool],
    patience_s: float = PATIENCE_S,
    explain: Callable[[], str] = lambda: "",
    every_s: float = 0.2,
) -> None:
    """Wait for something to become true; fail with an explanation if it does not."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"waited {patience_s} s in vain. {explain()}"
        time.sleep(every_s)


def steps_done(run: Path) -> int:
    """The last step in a run's metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def train_log(run: Path) -> str:
    log = run / "logs" / "train.log"
    return log.read_text(errors="replace") if log.exists() else "no log"


@contextmanager
def explained(run: Path) -> Iterator[None]:
    """Show what the run's jobs said if something fails."""
    try:
        yield
    except BaseException:
        print(f"--- {run} ---\n{train_log(run)}")
        for log in sorted((run / "logs").glob("*/*.log")):
            print(f"--- {log.relative_to(run)} ---\n{log.read_text(errors='replace')[-3000:]}")
        raise
