"""One voice: what commands say while they work. What a command was asked for (a table, JSON, a path) is printed.

Everything goes through `log`, the standard logger `mvar`: a program that uses mvar as a library hears it as any other.
A command listens with `speaking`:

    console   rank 0 says everything, other ranks errors alone; warnings and errors on stderr, the rest on stdout
    file      under Slurm, each rank its own (RUN/logs/rank-00003.log), with milliseconds, host and rank

Needs nothing but Python.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("mvar")

DATE = "%Y-%m-%d %H:%M:%S"
FILE_FORMAT = "%(asctime)s.%(msecs)03d %(host)s rank %(rank)d %(levelname)s %(message)s"


def rank_hint(environ: Mapping[str, str]) -> int:
    """Our rank, before anything is checked: good enough to decide who speaks."""
    text = environ.get("RANK") or environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class Chosen:
    """Something that was decided by itself, as a start tells it."""

    what: str
    way: str
    reason: str = ""
    slow: bool = False
    """A faster way exists, and the reason says what is in its way."""

    def __str__(self) -> str:
        return f"{self.what}: {self.way}" + (f", because {self.reason}" if self.reason else "")


def tell(chosen: Iterable[Chosen]) -> None:
    """A line for each; loudly where it is the slow way."""
    for one in chosen:
        log.log(logging.WARNING if one.slow else logging.INFO, "%s", one)


@contextmanager
def speaking(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Let this process's voice be heard as long as this lasts."""
    before = log.level, log.propagate, list(log.handlers)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Console(rank_hint(environ)))
    try:
        yield
    finally:
        level, log.propagate, kept = before
        log.setLevel(level)
        for handler in [handler for handler in log.handlers if handler not in kept]:
            log.removeHandler(handler)
            with suppress(OSError):  # A full disk.
                handler.close()


def write_to(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Under Slurm, keep what this rank says from here on in `folder` too, until `speaking` ends."""
    if "SLURM_JOB_ID" not in environ:
        return
    rank = rank_hint(environ)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _File(folder / f"rank-{rank:05d}.log", encoding="utf-8")
    except OSError as error:
        log.warning("%s: %s; what rank %d says is not kept there.", folder, error, rank)
        return
    handler.addFilter(_Sender(rank))
    handler.setFormatter(logging.Formatter(FILE_FORMAT, DATE))
    log.addHandler(handler)


class _Sender(logging.Filter):
    """Writes into each record who speaks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank, self._host = rank, socket.gethostname()

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank, record.host = self._rank, self._host
        return True


class _Silent:
    """A terminal that is gone, a disk that is full: no reason to end a training, or to shout about it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _File(_Silent, logging.FileHandler):
    pass


class _Console(_Silent, logging.Handler):
    """The terminal, or whatever a launcher made of it."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.ERROR)
        self.addFilter(_Sender(rank))
        who = "" if rank == 0 else "rank %(rank)d on %(host)s: "
        self._usual = logging.Formatter("%(asctime)s %(message)s", DATE)
        self._loud = logging.Formatter("%(asctime)s %(levelname)s: %(message)s", DATE)
        self._last = logging.Formatter(f"mvar: error: {who}%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.ERROR:
            return self._last.format(record)
        return (self._loud if record.levelno >= logging.WARNING else self._usual).format(record)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr, flush=True)
        except OSError:
            self.handleError(record)
