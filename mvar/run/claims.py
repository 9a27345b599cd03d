"""Claims: of all processes that share a folder, on however many hosts, one holds a name; those of the dead go over.

A claim is a file that only one process can make, and that its holder touches again and again. A holder that is dead (on
this host: its lock is gone) or silent for long loses it. Tasks of a tokenization claim shards: should two hold one
after all, both write the same bytes and the last rename wins. A training claims its run folder, and ends when it finds
that its claim is gone (it slept for long, and another process took over).

Ages are differences of times that the file system gave, so the hosts' clocks do not matter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from mvar.errors import StoreError
from mvar.files.disk import create_temporary, host_name, is_unlocked

HEARTBEAT_S = 10.0
STALE_AFTER_S = 90.0
SUFFIX = ".claim"


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
        """Claim a name; False where somebody else has it. Raises StoreError: no hard links in this folder."""
        path = self._path(name)
        try:
            file, temporary = create_temporary(path)
            file.write(f"{host_name()}\nprocess {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            taken = self._link(temporary, path, os.fstat(file.fileno()).st_mtime)
            temporary.unlink()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be made ({error.strerror}). Claims need a writable file system with hard links; "
                "to tokenize without them: --task I --tasks N."
            ) from None
        if not taken:
            file.close()
            return False
        with self._mutex:
            self._held[name] = file
        return True

    def holds(self, name: str) -> bool:
        """Whether a claim that was taken is still this process's."""
        with self._mutex:
            file = self._held[name]
        try:
            return self._path(name).stat().st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def holder(self, name: str) -> tuple[str, float]:
        """Who has it, in words, and when it last gave a sign of life (the file system's clock). Raises OSError."""
        path = self._path(name)
        return _holder(path)[1], path.stat().st_mtime

    def release(self, name: str) -> None:
        """Give a claim back, unless somebody took it over."""
        with self._mutex:
            file = self._held.pop(name)
        with file, contextlib.suppress(OSError):
            if self._path(name).stat().st_ino == os.fstat(file.fileno()).st_ino:
                self._path(name).unlink()

    def _link(self, temporary: Path, path: Path, now_s: float) -> bool:
        """Give the locked temporary the claim's name, if that is free or its holder is gone."""
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return True
        grave = path.with_name(f"{path.name}~{secrets.token_hex(4)}.tmp")
        try:
            if not _is_abandoned(path, now_s, self._stale_after_s):
                return False
            os.rename(path, grave)  # Only one of those who see it abandoned succeeds.
            grave.unlink()
            os.link(temporary, path)
        except (FileNotFoundError, FileExistsError):
            return False
        return True

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
        return None if _is_abandoned(path, now_s, stale_after_s) else _holder(path)[1]
    return None


def _is_abandoned(path: Path, now_s: float, stale_after_s: float) -> bool:
    if now_s - path.stat().st_mtime > stale_after_s:
        return True
    return _holder(path)[0] == host_name() and is_unlocked(path)


def _holder(path: Path) -> tuple[str, str]:
    """The holder's host, and the holder in words."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return (lines[0], lines[-1]) if lines else ("", "another process")


def remove_claims(folder: Path) -> None:
    """Remove all claims of a finished job."""
    for path in folder.glob(f".*{SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()
