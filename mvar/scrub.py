"""`mvar scrub`: reads every byte that is kept and compares it with the digest it was written with.

    mvar scrub runs/d16                     all checkpoints of a run
    mvar scrub /data/codes                  all shards of a code store, its index and its quantizer
    mvar scrub runs/* /data/codes --json scrub.json

Disks and file systems lose bits without a word; a checkpoint or a shard that nobody reads for months is found damaged
on the day it is needed. Files are read from the disk, not from what the system remembers of them, as far as it lets us.
Nothing is changed. May run beside a training: a checkpoint that is removed meanwhile is no damage.

Exit codes: 0 all is as it was written, 1 something is damaged, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mvar.checkpoint.record import RECORD, CheckpointRecord
from mvar.cli import run_command
from mvar.data.manifest import MANIFEST, Manifest
from mvar.errors import MvarError
from mvar.files.disk import problem_of_file, write_text
from mvar.run.names import folder_of, steps_in

EXIT_DAMAGED = 1


@dataclass(frozen=True)
class KeptFile:
    """A file, and what it must be like."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Damage:
    path: str
    problem: str


@dataclass(frozen=True)
class Scrubbed:
    """What was found at one of the paths that were given."""

    path: str
    files: int
    bytes: int
    seconds: float
    damaged: list[Damage]

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 2**20
        read = f"{self.files:,} files, {self.bytes / 2**30:,.2f} GiB read at {rate:,.0f} MiB/s"
        return f"{self.path}: {read}: {len(self.damaged) or 'none'} damaged"


def scrub(path: Path) -> Scrubbed:
    """Read everything below a run, a checkpoint or a store. Raises MvarError if it is none."""
    began_s = time.perf_counter()
    damaged, files, read = [], 0, 0
    for folder, found in units(path):
        if isinstance(found, str):
            if folder.exists():
                damaged.append(Damage(str(folder), found))
                print(found, flush=True)
            continue
        for kept in found:
            forget(kept.path)
            problem = problem_of_file(kept.path, kept.bytes, kept.sha256)
            files, read = files + 1, read + kept.bytes
            if problem is not None:
                if not folder.exists():  # Retention removed it, or it was set aside, while it was read.
                    break
                damaged.append(Damage(str(kept.path), problem))
                print(f"{kept.path}: {problem}", flush=True)
    return Scrubbed(str(path), files, read, time.perf_counter() - began_s, damaged)


def units(path: Path) -> Iterator[tuple[Path, list[KeptFile] | str]]:
    """Folders that are complete or absent as a whole, with their files, or why these are not known."""
    if (path / MANIFEST).is_file():
        yield path, _of_store(path)
    elif (path / RECORD).is_file():
        yield path, _of_checkpoint(path)
    elif (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        for step in steps_in(path / "checkpoints"):
            folder = folder_of(path / "checkpoints", step)
            yield folder, _of_checkpoint(folder)
    else:
        raise MvarError(
            f"{path}: neither a run (config.yaml, checkpoints/), nor a checkpoint ({RECORD}), nor a complete code store"
            f" ({MANIFEST}). Give the folder of one."
        )


def _of_store(folder: Path) -> list[KeptFile] | str:
    try:
        manifest = Manifest.read(folder)
    except MvarError as error:
        return str(error)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return [
        KeptFile(folder / info.name, info.bytes, info.sha256) for info in (manifest.index, manifest.quantizer, *shards)
    ]


def _of_checkpoint(folder: Path) -> list[KeptFile] | str:
    try:
        record = CheckpointRecord.read(folder)
    except MvarError as error:
        return str(error)
    return [KeptFile(folder / name, info.bytes, info.sha256) for name, info in sorted(record.files.items())]


def forget(path: Path) -> None:
    """Ask the system to drop what it holds of a file in memory, so that the disk is read. It keeps what is in use."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="mvar scrub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN|STORE", help="run, checkpoint or code store")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    args = parser.parse_args(argv)
    found = []
    for path in args.paths:
        found.append(scrub(path))
        print(found[-1], flush=True)
    if args.json is not None:
        write_text(args.json, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return EXIT_DAMAGED if any(one.damaged for one in found) else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
