"""Several processes on one machine, as a launcher would start them, for tests of distributed code.

`Ranks` runs a command of mvar on every rank and can wait for it, signal it, or kill it. `run_ranks` calls a function of
a test module on every rank, inside a process group, and returns what the ranks returned.

Processes are real ones with their own pids. They are forked from a server that has imported torch and DeepSpeed but run
nothing, which saves each of them some five seconds of importing.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mvar.omp import sleep_when_idle
from mvar.run.world import choose_accelerator

REPOSITORY = Path(__file__).resolve().parents[2]
_PRELOAD = ["mvar.train", "deepspeed", "deepspeed.runtime.zero.muon.original_muon", "mvar.testing.ranks"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Ranks:
    """Processes of one job, started at once. `entry` is `module:function`; what it returns is the exit code.

    One rank runs without any launcher's variables.
    """

    def __init__(
        self,
        entry: str,
        arguments: Sequence[Any],
        ranks: int,
        folder: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        choose_accelerator()
        sleep_when_idle()
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(_PRELOAD)
        port = str(free_port())
        self.logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        self.processes: list[ForkServerProcess] = []
        for rank in range(ranks):
            env = dict(environ or {})
            if ranks > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                env |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = server.Process(target=_run, args=(entry, list(arguments), env, str(self.logs[rank])))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """Exit codes, by rank. Once a rank fails, the others have a little time to end, then they are killed."""
        deadline = None
        while any(process.exitcode is None for process in self.processes):
            if deadline is None and any(process.exitcode not in (None, 0, 75) for process in self.processes):
                deadline = time.monotonic() + 30
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
            time.sleep(0.01)
        return [int(process.exitcode or 0) for process in self.processes]

    def kill(self) -> None:
        """SIGKILL for every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send(self, number: signal.Signals, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def output(self) -> str:
        return "".join(f"--- {log.name} ---\n{log.read_text(errors='replace')}" for log in self.logs)

    def alive(self) -> bool:
        return all(process.exitcode is None for process in self.processes)


def _run(entry: str, arguments: list[Any], environ: dict[str, str], log: str) -> None:
    """In the new process."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environ)
    os.chdir(REPOSITORY)
    module, _, name = entry.partition(":")
    sys.exit(getattr(importlib.import_module(module), name)(*arguments))


def command(module: str, argv: list[str]) -> int:
    """What `python -m module argv...` does."""
    from mvar.cli import run_command

    return run_command(importlib.import_module(module).main, argv)


def run_ranks(function: Callable[..., Any], ranks: int, folder: Path, /, **arguments: Any) -> list[Any]:
    """Call `function(world, **arguments)` on every rank; arguments and results pass through JSON."""
    where = f"{function.__module__}:{function.__name__}"
    job = Ranks("mvar.testing.ranks:_worker", [where, str(folder), json.dumps(arguments)], ranks, folder)
    codes = job.wait()
    assert codes == [0] * ranks, f"exit codes {codes}\n{job.output()}"
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(ranks)]


def _worker(where: str, folder: str, arguments: str) -> int:
    from mvar.run import world as worlds

    module, _, name = where.partition(":")
    world = worlds.start(threads=1)
    result = getattr(importlib.import_module(module), name)(world, **json.loads(arguments))
    (Path(folder) / f"result{world.rank}.json").write_text(json.dumps(result))
    worlds.finish()
    return 0
