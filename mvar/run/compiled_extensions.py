"""Where DeepSpeed's extensions are kept once they are compiled, and the locks that killed compiles leave there.

torch compiles an extension in a folder of its own and keeps others out with a file `lock`, held open while it compiles.
Whoever finds the file waits until it is gone: for ever, if the compiling process was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

import torch

from mvar import shipped
from mvar.files.disk import host_name
from mvar.log import log

VARIABLE = "TORCH_EXTENSIONS_DIR"
QUIET_S = 600.0
"""A compile that may be another machine's, and that wrote nothing for this long, is dead. The longest that was seen
between two files of one compile is under three minutes."""
_HOSTS = ".hosts"


def prepare(environ: MutableMapping[str, str], quiet_s: float = QUIET_S) -> None:
    """Set TORCH_EXTENSIONS_DIR unless it is set, and take over the locks of dead compiles there, with a message."""
    if not environ.get(VARIABLE):
        environ[VARIABLE] = str(default_folder(environ))
    free_locks(Path(environ[VARIABLE]), quiet_s)


def default_folder(environ: Mapping[str, str]) -> Path:
    """A folder for this Python, torch, CPU (extensions are compiled for its instructions) and user.

    In MVAR_CACHE (in a Slurm job, on the node's own disk), else in `.cache` of the checkout (of MVAR_HOME where the
    code is a job's copy), else in the user's cache, else in the temporary folder: the first that can be written.
    """
    user_cache = Path(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "mvar"
    checkout = environ.get("MVAR_HOME") or (None if shipped.INSTALLED else shipped.CODE)
    caches = [user_cache, Path(tempfile.gettempdir()) / f"mvar-{_user()}"]
    if checkout is not None:
        caches.insert(0, Path(checkout) / ".cache")
    if environ.get("MVAR_CACHE"):
        caches.insert(0, Path(environ["MVAR_CACHE"]))
    for cache in caches:
        folder = cache / "torch_extensions" / _build()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return folder  # The compile says what is wrong with it.


def free_locks(folder: Path, quiet_s: float = QUIET_S) -> None:
    """Remove every lock in `folder` whose compile is dead. What another machine may be compiling is waited for."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HOSTS).mkdir(exist_ok=True)
        (folder / _HOSTS / _here()).touch()
    for lock in sorted(folder.glob("*/lock")):
        told = False
        while _is_dead(lock, quiet_s) is None:
            if not told:
                log.warning("%s: another machine seems to compile there; it is waited for until it is silent.", lock)
            told = True
            time.sleep(1.0)
        with _one_at_a_time(folder):
            if _is_dead(lock, quiet_s):
                with contextlib.suppress(OSError):
                    lock.unlink()
                    log.warning("%s: left by a compile of %s that was killed; removed.", lock, lock.parent.name)


def _is_dead(lock: Path, quiet_s: float) -> bool | None:
    """Whether the compile behind a lock is dead; None: another machine's, perhaps. A lock that is gone is not dead."""
    try:
        file = lock.stat()
        if _is_open_here(file):
            return False
        # Every machine enters its name before it compiles, so a folder with no other name has no other's locks.
        hosts = {entry.name for entry in (lock.parents[1] / _HOSTS).glob("*")}
        if hosts == {_here()} and file.st_uid == os.getuid():
            return True
        newest = max(entry.stat().st_mtime for entry in lock.parent.iterdir())
    except OSError:
        return False
    return True if time.time() - newest > quiet_s else None


def _is_open_here(file: os.stat_result) -> bool:
    """Whether a process of this user on this machine has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.path.samestat(descriptor.stat(), file):
                return True
    return False


def _here() -> str:
    """This machine, or the container on it whose processes see each other only."""
    return f"{host_name()}-{os.stat('/proc/self/ns/pid').st_ino}"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Ranks of this machine look and remove one after the other, so that nobody removes the next compile's lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # A file system without locks: then they do not.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _build() -> str:
    version = f"py{sys.version_info[0]}.{sys.version_info[1]}-torch{torch.__version__}"
    return f"{_user()}-{version}-{platform.machine()}-{_cpu()}"


def _user() -> str:
    try:
        return re.sub(r"[^\w.-]", "_", getpass.getuser())
    except (KeyError, OSError):  # Nobody's name in a container.
        return str(os.getuid())


def _cpu() -> str:
    """Eight digits that stand for the instructions of this CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = platform.processor()
    known = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return hashlib.sha256((known[1] if known else platform.processor()).encode()).hexdigest()[:8]
