"""What a file system does and does not do of what checkpoints, claims and caches want."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mvar.files.disk import look_at, sync_file, sync_folder
from mvar.machine.findings import Finding
from mvar.run.claims import STALE_AFTER_S

GIB = 2**30
SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "panfs",
    "wekafs",
    "glusterfs",
}
"""Types of file systems that other machines see too. Those of FUSE count as shared."""
SLOW_SYNC_S = 0.5
CACHES = {
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "{tmp}/torchinductor_{user}",
    "TORCH_EXTENSIONS_DIR": "~/.cache/torch_extensions",
}
"""Variable -> where compiled code is kept without it."""


def kind_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system that holds `path`, such as ext4; `unknown` where the system does not say."""
    here, best, kind = existing(path).resolve(), -1, "unknown"
    try:
        lines = mounts.read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, its_kind = line.split(" ")[:3]
        folder = Path(point.replace("\\040", " "))
        if (folder == here or folder in here.parents) and len(folder.parts) > best:
            best, kind = len(folder.parts), its_kind
    return kind


def is_shared(kind: str) -> bool:
    return kind in SHARED or kind.startswith("fuse")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def look_at_caches(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Where compiled code is kept. On a shared disk all processes of a job wait for it, and write over each other."""
    found, user = [], getpass.getuser()
    for name, default in CACHES.items():
        told = environ.get(name)
        path = Path(told or default.format(tmp=tempfile.gettempdir(), user=user)).expanduser()
        kind = kind_of(path)
        text = f"{path} on {kind}" + ("" if told else " (not set)")
        if is_shared(kind):
            local = Path(tempfile.gettempdir()) / f"{name.lower().removesuffix('_dir')}_{user}"
            found.append(Finding(name, f"{text}: shared with other machines", "bad", f"export {name}={local}"))
        else:
            found.append(Finding(name, text))
    return found


def look_at_folder(path: Path) -> list[Finding]:
    """What a run folder's file system does, tried in a folder that is removed again."""
    place = existing(path)
    usage = shutil.disk_usage(place)
    found = [
        Finding("where", f"{path} on {kind_of(place)}, {usage.free / GIB:.1f} of {usage.total / GIB:.0f} GiB free")
    ]
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".mvar-doctor-", dir=place)
    except OSError as error:
        return [*found, Finding("writing", f"{place}: {error.strerror or error}", "bad")]
    with scratch as name:
        for what, trial in TRIALS.items():
            try:
                found.append(Finding(what, trial(Path(name))))
            except DoneWithoutError as error:
                found.append(Finding(what, f"no: {error}", "missing"))
            except OSError as error:
                found.append(Finding(what, f"no: {error.strerror or error}", "bad"))
    return found


def _rename(folder: Path) -> str:
    """A file takes the place of another, a folder gets its final name."""
    (folder / "old").write_text("old")
    (folder / "new").write_text("new")
    os.replace(folder / "new", folder / "old")
    (folder / "draft").mkdir()
    os.rename(folder / "draft", folder / "final")
    if (folder / "old").read_text() != "new" or not (folder / "final").is_dir() or (folder / "new").exists():
        raise OSError("what was renamed is not what is there")
    return "works"


class DoneWithoutError(Exception):
    """What a file system lacks and mvar does otherwise, in words."""


def _link(folder: Path) -> str:
    (folder / "file").write_text("linked")
    try:
        os.link(folder / "file", folder / "link")
    except OSError as error:
        raise DoneWithoutError(f"{error.strerror or error}; states of a tokenizer's training are copied") from None
    if (folder / "link").stat().st_nlink != 2:
        raise OSError("links are not counted")
    return "work"


def _lock(folder: Path) -> str:
    """A second opening of a locked file must be refused."""
    if look_at(folder).locks:
        return "works"
    raise DoneWithoutError(
        f"a lock keeps nobody out; after a kill the next start waits until the old process has been silent for"
        f" {STALE_AFTER_S:.0f} s (checkpoint.takeover_s)"
    )


def _sync(folder: Path) -> str:
    with (folder / "synced").open("wb") as file:
        file.write(os.urandom(1 << 20))
        since_s = time.perf_counter()
        sync_file(file)
    whole = sync_folder(folder)
    took_s = time.perf_counter() - since_s
    what = "1 MiB and its folder" if whole else "1 MiB; not of folders, so a crash of the server may lose a rename"
    return f"{1e3 * took_s:.0f} ms for {what}" + (": slow" if took_s > SLOW_SYNC_S else "")


TRIALS: dict[str, Callable[[Path], str]] = {
    "atomic rename": _rename,
    "hard links": _link,
    "flock": _lock,
    "fsync": _sync,
}
