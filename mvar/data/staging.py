"""A code store on a node's own disk: copied once from a folder or URL, checked, shared by the ranks of the node."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from mvar.data.manifest import MANIFEST, FileInfo, Manifest
from mvar.errors import StoreError
from mvar.files.disk import STALE_AFTER_S, cannot_write, look_at, make_folder, remove_stale, write_file
from mvar.files.remote import fetch, read
from mvar.log import log
from mvar.paths import is_url

COPIES_AT_ONCE = 4


def stage(store: str | Path, folder: Path) -> Path:
    """The folder under `folder` that holds a copy of the store, made now if there is none.

    `store` is a folder, a URL to whose end `/NAME` is added, or one in which `{file}` stands for the name
    (`pipe:aws s3 cp s3://bucket/codes/{file} -`). The copy is named by the manifest's digest, so another store gets
    another place. Any number of processes may call this at once: one copies, the others wait; where the file system has
    no locks, each copies for itself. Every file arrives whole and with its digest; a copy that was interrupted is
    carried on. Raises StoreError, WriteError.
    """
    if not is_url(str(store)):
        Manifest.read(Path(store))  # Says what is wrong with it and what to do.
    data = read(file_url(store, MANIFEST))
    target = folder / hashlib.sha256(data).hexdigest()[:16]
    make_folder(target)
    with _alone(target) as alone:
        if (target / MANIFEST).is_file():
            return target
        remove_stale(target, stale_after_s=0 if alone else STALE_AFTER_S)
        manifest = Manifest.parse(data, str(store))
        files: list[FileInfo] = [manifest.index, manifest.quantizer]
        files += [shard for split in manifest.splits.values() for shard in split.shards]
        missing = [info for info in files if not _has(target / info.name, info)]
        _require_room(target, sum(info.bytes for info in missing), str(store))
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            list(
                pool.map(
                    lambda info: fetch(file_url(store, info.name), target / info.name, sha256=info.sha256), missing
                )
            )
        write_file(target / MANIFEST, data)
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process copies into the folder, and keep others out; False where locks cannot do that."""
    try:
        with (folder / "lock").open("w") as lock:
            locks = look_at(folder).locks
            if locks:
                fcntl.flock(lock, fcntl.LOCK_EX)  # Dies with its holder.
            else:
                log.warning("%s: this file system has no locks, so each rank copies the store for itself.", folder)
            yield locks
    except OSError as error:
        raise cannot_write(folder, error) from None


def file_url(store: str | Path, name: str) -> str:
    """Where a file of a store lies."""
    text = str(store)
    return text.replace("{file}", name) if "{file}" in text else f"{text.rstrip('/')}/{name}"


def _has(path: Path, info: FileInfo) -> bool:
    """Whether an interrupted copy has brought this file: only files with the right digest get their name."""
    return path.is_file() and path.stat().st_size == info.bytes


def _require_room(folder: Path, needed: int, store: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"staging {store}: {needed:,} bytes have to be copied, {folder} has {free:,} free. Make room, give another "
            "folder (data.stage), or read the store where it is (data.reader=mmap)."
        )
