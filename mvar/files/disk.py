"""Files that are complete or absent: a temporary name, sync, rename, sync of the folder.

A temporary is locked while its writer lives, so that another process can tell a stale one from one in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mvar.errors import StoreError

BLOCK_BYTES = 1 << 20
"""Read at once when a file is digested."""
STALE_AFTER_S = 3600.0
"""Age at which a temporary of another host is stale, where locks may not reach from host to host."""


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when it raises. Raises StoreError.

    Several processes may write the same path at once: each has its own temporary, the last rename wins.
    """
    try:
        file, temporary = create_temporary(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error}). Make room or give a writable folder, "
            "then run the same command again: what is complete is kept."
        ) from None


def write_file(path: Path, data: bytes) -> None:
    """Write a whole small file so that it is complete or absent. Raises StoreError."""
    with writing(path) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"folder {path}: cannot be made ({error.strerror}). Give a writable place.") from None


def remove_stale(folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> int:
    """Remove temporaries that dead processes left in `folder`; returns how many. Those in use stay."""
    removed = 0
    for temporary in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            here = temporary.name.split("~")[1:2] == [host_name()]
            old = time.time() - temporary.stat().st_mtime > stale_after_s
            if (here or old) and is_unlocked(temporary):
                temporary.unlink()
                removed += 1
    return removed


def create_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path`, open and locked while this process lives."""
    while True:
        temporary = path.with_name(f".{path.name}~{host_name()}~{os.getpid()}~{secrets.token_hex(4)}.tmp")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):  # File systems without locks: the age decides.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(temporary).st_ino == os.fstat(file.fileno()).st_ino:
                return file, temporary
        file.close()  # Somebody took it for stale between its creation and its lock.


def is_unlocked(path: Path) -> bool:
    """Whether nobody holds the file's lock: its writer is dead, as far as locks reach. Raises OSError."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def host_name() -> str:
    """This host's name, as it stands in file names."""
    return socket.gethostname().replace("~", "-").replace("/", "-")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def tree_digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON tree, whatever the order of its keys and its layout."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk, so that a rename outlives a crash of the machine. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_folder(folder: Path) -> None:
    """Remove a folder so that a kill half-way never leaves half of it under its name."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)
