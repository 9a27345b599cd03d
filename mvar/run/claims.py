"""Claims: of all processes that share a folder, on however many hosts, one holds a name; those of the dead go over.

A claim is a file that only one process can make, and that its holder touches again and again. A holder that is dead (on
this host: its lock is gone) or silent for long loses it. Where locks say nothing, silence alone decides. Tasks of a
tokenization claim shards: should two hold one after all, both write the same bytes and the last rename wins. A training
claims its run folder, and ends when it finds that its claim is gone (it slept for long, and another process took over).

Of several who find one claim abandoned, the first takes it away and makes its own; a slower one takes that away, sees
that it is not what it checked, and gives it back.

Ages are differences of times that the file system gave, so the hosts' clocks do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mvar.files.disk import cannot_write, host_name, is_locked, lock, look_at, sync_file

HEARTBEAT_S = 10.0
STALE_AFTER_S = 90.0
SUFFIX = ".claim"
AWAY_S = 0.5
"""A claim that somebody took away by mistake is given back within this time."""


@dataclass(frozen=True)
class Holder:
    """Who has a claim."""

    words: str
    beat_s: float
    """When it last gave a sign of life, by the file system's clock."""
    alive: bool
    """Whether it is known to be: a process of this host whose lock can be seen."""


class Claims:
    """This process's claims in a folder; a context that keeps them alive and gives them back at its end."""

    def __init__(self, folder: Path, *, heartbeat_s: float = HEARTBEAT_S, stale_after_s: float = STALE_AFTER_S) -> None:
        self._folder = folder
        self._heartbeat_s = heartbeat_s
        self._stale_after_s = stale_after_s
        self._held: dict[str, BinaryIO] = {}
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mvar-heartbeat", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim a name; False where somebody else has it. Raises WriteError."""
        path = self._path(name)
        try:
            file = _make(path)
            if file is None and _take_away(path, self._stale_after_s):
                file = _make(path)
        except OSError as error:
            raise cannot_write(path, error) from None
        if file is None:
            return False
        with self._mutex:
            self._held[name] = file
        return True

    def holds(self, name: str) -> bool:
        """Whether a claim that was taken is still this process's."""
        with self._mutex:
            file = self._held[name]
        since_s = time.monotonic()
        while True:
            try:
                return os.path.samestat(self._path(name).stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                if time.monotonic() - since_s > AWAY_S:
                    return False
            except OSError as error:
                if error.errno != errno.ESTALE:  # NFS: what was open was removed by another host.
                    raise
                return False
            time.sleep(AWAY_S / 10)

    def holder(self, name: str) -> Holder:
        """Who has it. Raises OSError."""
        path = self._path(name)
        seen = _Seen.of(path)
        return Holder(seen.words, seen.beat_ns / 1e9, seen.host == host_name() and is_locked(path) is True)

    def release(self, name: str) -> None:
        """Give a claim back, unless somebody took it over."""
        with self._mutex:
            file = self._held.pop(name)
        with file, contextlib.suppress(OSError):
            if os.path.samestat(self._path(name).stat(), os.fstat(file.fileno())):
                self._path(name).unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            with self._mutex:
                for file in self._held.values():
                    with contextlib.suppress(OSError):
                        os.utime(file.fileno())

    def _path(self, name: str) -> Path:
        return claim_path(self._folder, name)


def claim_path(folder: Path, name: str) -> Path:
    return folder / f".{name}{SUFFIX}"


def living_holder(folder: Path, name: str, now_s: float, stale_after_s: float = STALE_AFTER_S) -> str | None:
    """Who has a claim, in words; None if nobody has it, or a dead process."""
    path = claim_path(folder, name)
    with contextlib.suppress(OSError):
        seen = _Seen.of(path)
        return None if seen.is_abandoned(path, now_s, stale_after_s, locks=True) else seen.words
    return None


@dataclass(frozen=True)
class _Seen:
    """A claim, as it was seen. Another one is not equal to it, nor the same one after a sign of life."""

    text: str
    """With a number that no other claim has: inodes are reused, and some file systems change them in a rename."""
    beat_ns: int

    @classmethod
    def of(cls, path: Path) -> _Seen:
        """Raises OSError."""
        with path.open(encoding="utf-8", errors="replace") as file:  # Opening it asks a server for what is true now.
            return cls(file.read(), os.fstat(file.fileno()).st_mtime_ns)

    @property
    def host(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def words(self) -> str:
        return self.text.rpartition("\n")[2] or "another process"

    def is_abandoned(self, path: Path, now_s: float, stale_after_s: float, *, locks: bool) -> bool:
        """`locks`: whether the file system's locks can be believed."""
        if now_s - self.beat_ns / 1e9 > stale_after_s:
            return True
        return locks and self.host == host_name() and is_locked(path) is False


def _make(path: Path) -> BinaryIO | None:
    """A new claim, open and locked; None if there is one. Raises OSError."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return None
    try:
        lock(file)
        # The lock comes first: a claim that names this host and has none is a dead one's.
        words = f"process {os.getpid()} on {socket.gethostname()}"
        file.write(f"{host_name()}\n{secrets.token_hex(8)}\n{words}".encode())
        sync_file(file)
    except OSError:
        with file, contextlib.suppress(OSError):
            path.unlink()
        raise
    return file


def _take_away(path: Path, stale_after_s: float) -> bool:
    """Take the claim of a dead holder away; False: it lives, or somebody else was quicker. Raises OSError."""
    grave = path.with_name(f"{path.name}~{secrets.token_hex(4)}.tmp")
    now = look_at(path.parent)
    with contextlib.suppress(FileNotFoundError):  # Given back, or taken away by somebody else.
        seen = _Seen.of(path)
        if seen.is_abandoned(path, now.now_s, stale_after_s, locks=now.locks):
            os.rename(path, grave)
            if _Seen.of(grave) == seen:
                grave.unlink()
                return True
            _give_back(grave, path)
    return False


def _give_back(grave: Path, path: Path) -> None:
    """What was taken away is another's, or alive after all. A claim that was made meanwhile stays. Raises OSError."""
    try:
        os.link(grave, path)
    except FileExistsError:
        pass
    except OSError:  # No hard links here.
        if not path.exists():
            os.rename(grave, path)
            return
    grave.unlink()


def remove_claims(folder: Path) -> None:
    """Remove all claims of a finished job."""
    for path in folder.glob(f".*{SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()
