"""One shard: a plain tar whose bytes are a function of its samples alone, and the record that vouches for it.

Every sample takes the same number of bytes (two members with fixed headers), so a shard is also a table.

Legend: N samples of a shard, V views, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvar.data.manifest import Quarantined, ShardInfo
from mvar.data.store import CODES_SUFFIX, LABEL_SUFFIX, TAR_BLOCK, codes_header
from mvar.errors import StoreError
from mvar.files.disk import problem_of_file, write_file, writing

MTIME_S = 1_000_000_000
"""Modification time of every member: fixed, so that equal samples give equal bytes."""
END_OF_TAR = bytes(2 * TAR_BLOCK)


class ShardRecord(ShardInfo):
    """The JSON beside a shard: written after it, so its presence says that the shard was complete."""

    job_sha256: str
    quarantine: tuple[Quarantined, ...] = ()
    suspicious: tuple[str, ...] = ()
    """Keys of images that are nearly black, or nearly of one colour."""


class ShardTable(NamedTuple):
    """What lies where in a shard: `offset_N` of the codes in bytes, `label_N`, `keys`, `codes_NVL` (not a copy)."""

    keys: list[str]
    offset_N: NDArray[np.int64]
    label_N: NDArray[np.int32]
    codes_NVL: NDArray[np.uint16]


class ShardWriter:
    """Appends samples to an open tar, hashing what it writes.

    `quarantine`: images that were left out; `suspicious`: keys of those that are not, and look wrong.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.samples = 0
        self.bytes = 0
        self.quarantine: list[Quarantined] = []
        self.suspicious: list[str] = []
        self._file = file
        self._digest = hashlib.sha256()

    def add(self, key: str, codes_VL: NDArray[np.uint16], label: int) -> None:
        """Append one sample."""
        payload = codes_header(*codes_VL.shape) + np.ascontiguousarray(codes_VL, dtype="<u2").tobytes()
        self._put(_member(key + CODES_SUFFIX, payload) + _member(key + LABEL_SUFFIX, str(label).encode()))
        self.samples += 1

    def end(self) -> str:
        """Write the tar's end; returns the digest of all bytes."""
        self._put(END_OF_TAR)
        return self._digest.hexdigest()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


@contextmanager
def shard_writer(folder: Path, name: str, job_sha256: str) -> Iterator[ShardWriter]:
    """Writes shard `name` and then its record; when the block raises or the process dies, neither appears."""
    with writing(folder / name) as file:
        writer = ShardWriter(file)
        yield writer
        digest = writer.end()
    record = ShardRecord(
        name=name,
        samples=writer.samples,
        bytes=writer.bytes,
        sha256=digest,
        job_sha256=job_sha256,
        quarantine=tuple(writer.quarantine),
        suspicious=tuple(writer.suspicious),
    )
    write_file(record_path(folder, name), (record.model_dump_json() + "\n").encode())


def record_path(folder: Path, name: str) -> Path:
    return folder / f"{name.removesuffix('.tar')}.json"


def read_record(folder: Path, name: str) -> ShardRecord | None:
    """The record of a shard; None where it is missing or damaged (then the shard has to be made again)."""
    try:
        return ShardRecord.model_validate(json.loads(record_path(folder, name).read_bytes()))
    except (OSError, ValueError):
        return None


def is_complete(folder: Path, name: str, job_sha256: str) -> bool:
    """Whether the shard is there with the bytes that its record promises.

    Raises StoreError when it was made by another job: with another tokenizer, configuration, or source.
    """
    record = read_record(folder, name)
    if record is None:
        return False
    if record.job_sha256 != job_sha256:
        raise StoreError(
            f"shard {folder / name}: made by another job (job {record.job_sha256[:12]}, this one is "
            f"{job_sha256[:12]}): another tokenizer, configuration or source. Give another store=..., or remove it."
        )
    if record.name != name:  # A copy of another shard under this name.
        return False
    return problem_of_file(folder / name, record.bytes, record.sha256) is None


def read_shard(path: Path, views: int, tokens: int) -> ShardTable:
    """A shard as a table, after a check of all members. Raises StoreError: no samples of `views` x `tokens` codes."""
    header = np.frombuffer(codes_header(views, tokens), dtype=np.uint8)
    payload = len(header) + 2 * views * tokens
    label_at = TAR_BLOCK + _padded(payload)
    stride = label_at + 2 * TAR_BLOCK
    size = path.stat().st_size
    if size % stride != len(END_OF_TAR) % stride or size < len(END_OF_TAR):
        raise StoreError(_not_a_shard(path, f"its size {size:,} does not fit samples of {views} x {tokens} codes"))
    count = (size - len(END_OF_TAR)) // stride
    rows = np.memmap(path, dtype=np.uint8, mode="r", shape=(count, stride)) if count else np.empty((0, stride), "u1")
    if not (rows[:, TAR_BLOCK : TAR_BLOCK + len(header)] == header).all():
        raise StoreError(_not_a_shard(path, f"a sample does not hold {views} x {tokens} codes"))
    keys = [_name(row) for row in rows[:, :100]]
    labels = [_name(row) for row in rows[:, label_at : label_at + 100]]
    if any(a != b + CODES_SUFFIX for a, b in zip(keys, (x.removesuffix(LABEL_SUFFIX) for x in labels), strict=True)):
        raise StoreError(_not_a_shard(path, "its members are not pairs of codes and label"))
    try:
        label_N = np.array([int(_name(row)) for row in rows[:, label_at + TAR_BLOCK :]], dtype=np.int32)
    except ValueError:
        raise StoreError(_not_a_shard(path, "a label is not a number")) from None
    first = TAR_BLOCK + len(header)
    return ShardTable(
        keys=[key.removesuffix(CODES_SUFFIX) for key in keys],
        offset_N=first + stride * np.arange(count, dtype=np.int64),
        label_N=label_N,
        codes_NVL=rows[:, first : TAR_BLOCK + payload].view("<u2").reshape(count, views, tokens),
    )


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), MTIME_S, 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(_padded(len(data)) - len(data))


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _name(field: NDArray[np.uint8]) -> str:
    return field.tobytes().split(b"\0", 1)[0].decode("ascii", "replace")


def _not_a_shard(path: Path, why: str) -> str:
    return f"shard {path}: {why}. It is damaged or belongs to another store. Remove it and tokenize again."
