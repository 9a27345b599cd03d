"""The one writer: files and folders that are complete or absent, whatever kills the process or fills the disk.

A file is written under a temporary name beside its own, synced, renamed, and the folder is synced, so that the rename
outlives a crash of the machine, too. Whatever the operating system answers becomes a WriteError that names the path and
says what to do; the temporary is gone then, and what had the name before still has it. Several processes may write one
path at once: each has its own temporary, the last rename wins. A temporary is locked while its writer lives, so that
another process can tell a stale one from one in use.

File systems lack this or that: hard links (then a copy is made), locks (then age decides), the sync of folders. None of
it is an error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mvar import headway
from mvar.errors import WriteError

BLOCK_BYTES = 1 << 20
"""Read at once when a file is digested."""
STALE_AFTER_S = 3600.0
"""Age at which a temporary of another host is stale, where locks may not reach from host to host."""
_TRASH = ".trash-"
_CANNOT_SYNC_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer on which a folder cannot be synced: nothing more can be done there."""
_CANNOT_LINK = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""What file systems answer that have no hard links, or none for this file."""


@contextmanager
def writing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends, and vanishes when it raises. Raises WriteError.

    Folders are made as needed. `sync=False` is for pictures by the thousand, which a command makes again: a crash of
    the machine (not of the process) may leave the last of them empty.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = create_temporary(path)
        try:
            with file:
                yield file
                if sync:
                    sync_file(file)
                else:
                    file.flush()
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_file(path: Path, data: bytes) -> None:
    """Write a whole small file. Raises WriteError."""
    with writing(path) as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> None:
    """Write a whole small file, unless one has its name: of several writers one wins, and nobody ever sees another's.

    Where the file system has no hard links, the last of those that write in the same moment wins. Raises WriteError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = create_temporary(path)
        try:
            with file:
                file.write(data)
                sync_file(file)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return
                except OSError:
                    if not path.exists():
                        os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a whole small text as UTF-8. Raises WriteError."""
    write_file(path, text.encode())


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the name `path` when the block ends, in place of a folder that had it, and vanishes when
    it raises. What the block puts into it, it writes with `synced`. Raises WriteError."""
    temporary = _temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            publish_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """A binary file on disk when the block ends, for what lies in a folder that gets its name later. Raises OSError."""
    with path.open("wb") as file:
        yield file
        sync_file(file)


def publish_folder(temporary: Path, path: Path) -> None:
    """Give a folder whose files are synced its name, in place of a folder that had it. Raises OSError."""
    sync_folder(temporary)
    if path.exists():
        os.rename(path, _trash_name(path))
    os.rename(temporary, path)
    sync_folder(path.parent)
    for trash in path.parent.glob(f"{_TRASH}{glob.escape(path.name)}-*"):
        shutil.rmtree(trash, ignore_errors=True)


def place(path: Path, make: Callable[[Path], object]) -> None:
    """Have a link made under a temporary name, and give it the name `path`. Raises WriteError."""
    temporary = _temporary_name(path)
    try:
        try:
            make(temporary)
            os.replace(temporary, path)
        finally:  # Also where both were links to one file: then nothing was renamed.
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def keep_beside(path: Path, name: Path) -> None:
    """Give a file, as it is now, a second name: what is written to `path` later does not change it. Raises WriteError.

    A hard link, or a copy where there are none.
    """
    place(name, lambda link: _link_or_copy(path, link))


def _link_or_copy(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        with path.open("rb") as source, synced(link) as copy:
            shutil.copyfileobj(source, copy, BLOCK_BYTES)


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises WriteError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"folder {path}: cannot be made ({error.strerror}). Give a writable place.") from None


def cannot_write(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path}: cannot be written ({error.strerror or error}). Make room or give a writable folder, "
        "then run the same command again: what is complete is kept."
    )


def remove_stale(folder: Path, *, stale_after_s: float = STALE_AFTER_S) -> int:
    """Remove temporaries that dead processes left in `folder`; returns how many. Those in use stay.

    Where locks say nothing, one that is younger than `stale_after_s` may be in use: 0 is for who knows that none is.
    """
    removed = 0
    if temporaries := list(folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            now = look_at(folder)
            for temporary in temporaries:
                with contextlib.suppress(OSError):
                    if _is_stale(temporary, now, stale_after_s):
                        temporary.unlink()
                        removed += 1
    return removed


def _is_stale(temporary: Path, now: FileSystem, stale_after_s: float) -> bool:
    old = now.now_s - temporary.stat().st_mtime > stale_after_s
    if not now.locks:
        return old
    here = temporary.name.split("~")[1:2] == [host_name()]
    return (here or old) and is_locked(temporary) is False


@dataclass(frozen=True)
class FileSystem:
    """What a file system says of itself now."""

    now_s: float
    """Its clock, which the times of its files are of."""
    locks: bool
    """Whether a lock keeps a second opening of the file out. Some have no locks, some grant each to everybody."""


def look_at(folder: Path) -> FileSystem:
    """Try it with a file that is gone again. Raises OSError."""
    file, temporary = create_temporary(folder / "look")
    with file:
        try:
            os.utime(file.fileno())
            return FileSystem(os.fstat(file.fileno()).st_mtime, is_locked(temporary) is True)
        finally:
            temporary.unlink(missing_ok=True)


def create_temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `path`, open and locked while this process lives."""
    while True:
        temporary = _temporary_name(path)
        file = temporary.open("xb")
        lock(file)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(temporary).st_ino == os.fstat(file.fileno()).st_ino:
                return file, temporary
        file.close()  # Somebody took it for stale between its creation and its lock.


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}~{host_name()}~{os.getpid()}~{secrets.token_hex(4)}.tmp")


def lock(file: BinaryIO) -> None:
    """Lock a file for as long as it is open, where the file system has locks: where it has none, age decides."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool | None:
    """Whether somebody holds the file's lock, as far as locks reach; None: the file system has none. Raises OSError."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
    return False


def host_name() -> str:
    """This host's name, as it stands in file names."""
    return socket.gethostname().replace("~", "-").replace("/", "-")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            headway.made()
    return digest.hexdigest()


def problem_of_file(path: Path, size: int, sha256: str | None) -> str | None:
    """Why a file is not the one of `size` bytes and this digest (None: not compared), in words; None if it is."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"damaged, {found:,} bytes instead of {size:,}"
        if sha256 is not None and sha256_of(path) != sha256:
            return f"damaged, its sha256 is not the one that it was written with ({sha256[:12]}...)"
    except OSError as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return f"{what} ({error.strerror})"
    return None


def tree_digest(tree: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON tree, whatever the order of its keys and its layout."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync_file(file: BinaryIO) -> None:
    """Put what was written so far on disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> bool:
    """Put the names in a folder on disk, so that a rename outlives a crash of the machine; False where the file system
    cannot do that. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def discard_folder(folder: Path) -> None:
    """Remove a folder so that a kill half-way never leaves half of it under its name. Raises OSError."""
    trash = _trash_name(folder)
    os.rename(folder, trash)
    remove_tree(trash)


def remove_tree(folder: Path) -> None:
    """Remove a folder, but for what NFS keeps in it of files that somebody still has open. Raises OSError.

    NFS gives such a file the name `.nfs...`, which lasts until it is closed: whoever comes by later removes the rest.
    """
    shutil.rmtree(folder, ignore_errors=True)
    left = [path for path in folder.rglob("*") if not path.is_dir()]
    in_use = bool(left) and all(path.name.startswith(".nfs") for path in left)
    if folder.exists() and not in_use:
        shutil.rmtree(folder)


def _trash_name(folder: Path) -> Path:
    """A new one each time: what lies under an older one may be there to stay for a while."""
    return folder.with_name(f"{_TRASH}{folder.name}-{secrets.token_hex(4)}")
