"""Checkpoints: complete or absent, verified before use, independent of world size and ZeRO stage.

A checkpoint is a folder `step-000000123` of

    rank-00000.safetensors ...   for every parameter the elements that this rank owned: fp32 weight, AdamW's two
                                 moments, and the moving average of the weights if there is one
    checkpoint.json              configuration, step, samples seen, who holds which elements, sizes and SHA-256 of files
    config.yaml                  the configuration again, for people and for `--config`

It is written under a temporary name, synced to disk and renamed: a folder with its final name is complete. Whoever
loads reads the elements it needs out of whatever files hold them, so other numbers of ranks and other ZeRO stages need
no conversion, and the same ones get the same bits. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar import config as configs
from mvar.checkpoint.partition import KINDS, WEIGHT, Partition, Piece
from mvar.config import ModelConfig, TrainConfig
from mvar.errors import CheckpointError
from mvar.files.disk import sha256_of, sync_folder, tree_digest
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World
from mvar.schedule import Stretch

FORMAT_VERSION = 2
RECORD = "checkpoint.json"
CONFIG = "config.yaml"
_BLOCK_BYTES = 1 << 24


# --- one file of tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What a file must be like to be trusted."""

    bytes: int
    sha256: str


DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What tensors may be written in -> its name in a safetensors file."""


def write_tensors(
    path: Path,
    layout: list[tuple[str, tuple[int, ...]]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> FileRecord:
    """Write tensors as safetensors, one at a time, synced to disk. `values` come in the order of `layout`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, shape in layout:
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in _chunks([struct.pack("<Q", len(text)), text], values, dtype):
            file.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    assert written == 8 + len(text) + end
    return FileRecord(written, digest.hexdigest())


def _chunks(head: list[bytes], values: Iterable[Tensor], dtype: torch.dtype) -> Iterator[memoryview]:
    yield from (memoryview(part) for part in head)
    for value in values:
        array: Any = value.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
        whole = memoryview(array)
        for start in range(0, len(whole), _BLOCK_BYTES):
            yield whole[start : start + _BLOCK_BYTES]


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all the state there is, apart from weights and moments."""

    step: int = 0
    samples: int = 0
    adam_steps: int = 0
    """Updates made; fewer than `step` where steps were skipped."""
    skipped_steps: int = 0
    loss_scaler: dict[str, float] | None = None
    """fp16's dynamic loss scale."""
    stretches: tuple[Stretch, ...] = ()
    """The global batches of the run, one after the other; empty: that of the configuration from the beginning."""
    validation_loss: float | None = None
    """Mean cross entropy of a validation after this very step, if there was one."""


class Record(pydantic.BaseModel):
    """checkpoint.json."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    format_version: int
    progress: Progress
    config: dict[str, Any]
    """The resolved TrainConfig."""
    model: dict[str, Any]
    """The ModelConfig with the number of classes filled in."""
    store: str
    """SHA-256 of the code store's manifest."""
    world_size: int
    zero_stage: int
    kinds: tuple[str, ...] = KINDS
    """What is kept of every parameter."""
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter."""
    pieces: dict[str, list[tuple[str, int, int]]]
    """Parameter -> (file, first element, one past the last), elements of the flattened parameter."""
    files: dict[str, FileRecord]
    versions: dict[str, str]

    def text(self) -> str:
        """JSON with its own SHA-256, so that a flipped bit in it shows."""
        tree = self.model_dump(mode="json")
        return json.dumps(tree | {"sha256": tree_digest(tree)}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises CheckpointError, also for a record that was changed."""
        path = folder / RECORD
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None
        version = tree.get("format_version") if isinstance(tree, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: written in format {version}; this mvar reads up to {FORMAT_VERSION}. Update it."
            )
        if not isinstance(tree, dict) or tree.pop("sha256", None) != tree_digest(tree):
            raise CheckpointError(f"{path}: its own digest does not match: the file is damaged.")
        try:
            return cls.model_validate(tree)
        except pydantic.ValidationError as error:
            raise CheckpointError(f"{path}: not a checkpoint of mvar: {error}") from None


@dataclass(frozen=True)
class Identity:
    """What a run is, beyond its numbers: goes into every checkpoint and decides who may resume it."""

    config: TrainConfig
    model: ModelConfig
    """With the number of classes."""
    store: str
    """SHA-256 of the code store's manifest."""
    versions: dict[str, str] = field(default_factory=dict)


def differences(record: Record, identity: Identity, *, change_batch: bool = False) -> list[str]:
    """What keeps `identity` from going on with a checkpoint: changed keys of model, order of data and batch.

    `change_batch`: another global batch is meant.
    """
    keys = ("seed",) if change_batch else ("seed", "global_batch")
    saved: dict[str, Any] = {key: record.config.get(key) for key in keys}
    now: dict[str, Any] = {key: getattr(identity.config, key) for key in keys}
    saved |= {f"model.{key}": value for key, value in _essence(ModelConfig.model_validate(record.model)).items()}
    now |= {f"model.{key}": value for key, value in _essence(identity.model).items()}
    saved["data.store (its manifest)"], now["data.store (its manifest)"] = record.store[:12], identity.store[:12]
    return [f"{key}: was {saved[key]}, is {now[key]}" for key in now if saved[key] != now[key]]


def require_same(folder: Path, identity: Identity, *, change_batch: bool = False) -> Record:
    """The record of `folder`. Raises CheckpointError, with the keys, if `identity` is not the run that saved it."""
    record = Record.read(folder)
    changed = differences(record, identity, change_batch=change_batch)
    if changed:
        raise CheckpointError(
            f"{folder}: saved by another run than the one asked for:\n  "
            + "\n  ".join(changed)
            + "\nPut these back, or give run=... another folder, or add --from-scratch. To go on with another"
            " global_batch: --change-batch."
        )
    return record


def _essence(model: ModelConfig) -> dict[str, Any]:
    """The model's settings with defaults resolved, without the choice of kernels."""
    tree = model.model_dump(mode="json", exclude={"attention_backend", "mamba_backend", "norm_backend"})
    return tree | {"width": model.resolved_width, "heads": model.resolved_heads, "drop_path": model.resolved_drop_path}


# --- saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one rank wrote."""

    file: str
    record: FileRecord
    pieces: list[Piece]


class Draft:
    """A checkpoint that is being made. It exists only after `commit`.

    `begin`, `commit` and `abandon` are called by all ranks together; if one fails, all raise. `write` is each rank's
    own affair, in whatever thread.
    """

    def __init__(
        self, checkpoints: Path, partition: Partition, world: World, progress: Progress, identity: Identity
    ) -> None:
        self._partition, self._world, self._progress, self._identity = partition, world, progress, identity
        self.final = folder_of(checkpoints, progress.step)
        self._temporary = checkpoints / f".tmp-{self.final.name}"
        self._written: Part | None = None
        self._error: BaseException | None = None

    def begin(self, sync_records: Callable[[], None] = lambda: None) -> None:
        """Make the temporary folder, if there is room for the checkpoint. Raises CheckpointError.

        `sync_records`: called on rank 0 before anything else, for what must not be older on disk than the checkpoint.
        """
        self._world.raise_together(_attempt(lambda: self._prepare(sync_records)) if self._world.is_main else None)

    def _prepare(self, sync_records: Callable[[], None]) -> None:
        sync_records()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        needed = self._partition.bytes_of_all
        free = shutil.disk_usage(self._temporary).free
        if free < needed:
            raise CheckpointError(
                f"{self._temporary.parent}: a checkpoint takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are"
                " free. Free space; run again."
            )

    def write(self, values: Iterable[Tensor]) -> None:
        """Write this rank's part: `values` in the order of the partition's layout. `commit` tells of errors."""
        self._error = _attempt(lambda: self._write(values))

    def _write(self, values: Iterable[Tensor]) -> None:
        name = f"rank-{self._world.rank:05d}.safetensors"
        layout = self._partition.layout()
        shapes: list[tuple[str, tuple[int, ...]]] = [(_key(p.name, kind), (p.count,)) for p, kind in layout]
        record = write_tensors(self._temporary / name, shapes, values, {"step": str(self._progress.step)})
        self._written = Part(name, record, [piece for piece, kind in layout if kind == WEIGHT])

    def commit(self) -> Path:
        """Give the folder its name, once every rank has written. Raises CheckpointError."""
        self._world.raise_together(self._error)
        assert self._written is not None
        parts = self._world.gather(self._written)
        self._world.raise_together(_attempt(lambda: self._publish(parts)) if self._world.is_main else None)
        return self.final

    def _publish(self, parts: list[Part]) -> None:
        files = {part.file: part.record for part in parts}
        files[CONFIG] = _write_synced(self._temporary / CONFIG, configs.dump(self._identity.config))
        record = Record(
            format_version=FORMAT_VERSION,
            progress=self._progress,
            config=self._identity.config.model_dump(mode="json"),
            model=self._identity.model.model_dump(mode="json"),
            store=self._identity.store,
            world_size=self._world.size,
            zero_stage=self._partition.stage,
            kinds=self._partition.kinds,
            shapes=self._partition.shapes,
            pieces=_merge(parts),
            files=files,
            versions=self._identity.versions,
        )
        _write_synced(self._temporary / RECORD, record.text())
        sync_folder(self._temporary)
        if self.final.exists():  # Saved before, damaged since, and therefore passed over when this run started.
            _discard(self.final)
        os.rename(self._temporary, self.final)
        sync_folder(self.final.parent)

    def abandon(self) -> None:
        if self._world.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)


def save(checkpoints: Path, partition: Partition, world: World, progress: Progress, identity: Identity) -> Path:
    """Write the checkpoint of `progress.step`; all ranks together. Returns its folder.

    If any rank fails, all raise, and nothing but complete checkpoints remains.
    """
    draft = Draft(checkpoints, partition, world, progress, identity)
    try:
        draft.begin()
        draft.write(values for _, _, values in partition.blocks())
        return draft.commit()
    except BaseException:
        draft.abandon()
        raise


def _attempt(action: Any) -> BaseException | None:
    """Run `action`; the error, if any, instead of raising it. A full disk becomes a CheckpointError."""
    try:
        action()
    except OSError as error:
        return CheckpointError(f"checkpoint cannot be written: {error}. Free space or move the run folder; run again.")
    except Exception as error:
        return error
    return None


def _key(name: str, kind: str) -> str:
    return f"{kind}/{name}"


def _merge(parts: list[Part]) -> dict[str, list[tuple[str, int, int]]]:
    merged: dict[str, list[tuple[str, int, int]]] = {}
    for part in parts:
        for piece in part.pieces:
            merged.setdefault(piece.name, []).append((part.file, piece.start, piece.stop))
    return {name: sorted(spans, key=lambda span: span[1]) for name, spans in merged.items()}


def _write_synced(path: Path, text: str) -> FileRecord:
    data = text.encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _discard(folder: Path) -> None:
    """Remove a folder so that a kill half-way never leaves half of it under its name."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def retain(checkpoints: Path, *, last: int, every: int = 0, best: bool = False) -> None:
    """Remove all checkpoints but the newest `last`, those of every `every`-th step, and the `best` validated one.

    The newest one that is in order is never removed.
    """
    steps = steps_in(checkpoints)
    kept = set(steps[-last:])
    for step in reversed(steps):
        kept.add(step)
        if problem_of(folder_of(checkpoints, step), digests=False) is None:
            break
    if every:
        kept |= {step for step in steps if step % every == 0}
    if best:
        kept |= _best_of(checkpoints, steps)
    try:
        for step in steps:
            if step not in kept:
                _discard(folder_of(checkpoints, step))
    except OSError as error:  # Too many checkpoints are no reason to end a training.
        print(f"mvar: WARNING: an old checkpoint cannot be removed: {error}", file=sys.stderr, flush=True)


def _best_of(checkpoints: Path, steps: list[int]) -> set[int]:
    """The step with the lowest validation loss, if any was validated."""
    losses: dict[int, float] = {}
    for step in steps:
        with contextlib.suppress(CheckpointError):
            loss = Record.read(folder_of(checkpoints, step)).progress.validation_loss
            if loss is not None:
                losses[step] = loss
    return {min(losses, key=lambda step: (losses[step], step))} if losses else set()


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed processes left half-written or half-removed."""
    if checkpoints.is_dir():
        for entry in checkpoints.iterdir():
            if entry.name.startswith((".tmp-", ".trash-")):
                shutil.rmtree(entry)


# --- choosing --------------------------------------------------------------------------------------------------------


def verify(folder: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check sizes, and digests unless told not to. `share` (i, n): only every n-th file from the i-th on.

    Raises CheckpointError that names the file.
    """
    record = Record.read(folder)
    for name in sorted(record.files)[share[0] :: share[1]]:
        path, expected = folder / name, record.files[name]
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                raise CheckpointError(f"{path}: {size} bytes, expected {expected.bytes}.")
            if digests and sha256_of(path) != expected.sha256:
                raise CheckpointError(f"{path}: its SHA-256 differs from the one that was written.")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None


def problem_of(folder: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    try:
        verify(folder, digests=digests, share=share)
    except CheckpointError as error:
        return str(error)
    return None


def choose(checkpoints: Path, world: World, *, trust_sizes: bool = False) -> Path | None:
    """The newest checkpoint that verifies, the same for all ranks; None if there is none. Ranks share the reading.

    A damaged one is set aside as `step-....damaged` with a loud line.
    """
    for step in reversed(world.share(steps_in(checkpoints))):
        folder = folder_of(checkpoints, step)
        mine = problem_of(folder, digests=not trust_sizes, share=(world.rank, world.size))
        problems = [problem for problem in world.gather(mine) if problem]
        if not problems:
            return folder
        if world.is_main:
            aside = _set_aside(folder, "damaged")
            print(f"mvar: WARNING: damaged checkpoint set aside as {aside.name}: {problems[0]}", file=sys.stderr)
    return None


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Set checkpoints of later steps than `step` aside as `step-....diverged`."""
    for late in steps_in(checkpoints):
        if late > step:
            _set_aside(folder_of(checkpoints, late), "diverged")


def _set_aside(folder: Path, why: str) -> Path:
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{why}" + (f"-{number}" if number else ""))).exists():
        number += 1
    os.rename(folder, aside)
    return aside


# --- loading ---------------------------------------------------------------------------------------------------------


class Reader:
    """Any elements of any parameter of a checkpoint, from whatever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = Record.read(folder)
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, float32. Raises CheckpointError."""
        values = torch.empty(stop - start)
        missing = stop - start
        for file, first, last in self.record.pieces.get(name, []):
            low, high = max(start, first), min(stop, last)
            if low < high:
                values[low - start : high - start] = self._slice(file, _key(name, kind), low - first, high - first)
                missing -= high - low
        if missing:
            raise CheckpointError(f"{self.folder}: {missing} elements of {name} ({kind}) are in none of its files.")
        return values

    def _slice(self, file: str, key: str, low: int, high: int) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            values: Tensor = self._files[file].get_slice(key)[low:high]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {key} cannot be read ({error}).") from None
        return values


def restore(folder: Path, partition: Partition, world: World) -> Progress:
    """Load weights, moments and AdamW's count; all ranks together. Raises CheckpointError if the model differs."""
    reader = Reader(folder)
    _same_shapes(reader.record, partition.shapes, folder)

    def values(piece: Piece, kind: str) -> Tensor:
        # A moving average that is wanted from here on begins at the weights.
        return reader.read(piece.name, kind if kind in reader.record.kinds else WEIGHT, piece.start, piece.stop)

    def fill() -> None:
        partition.fill(values)
        partition.adam_steps = reader.record.progress.adam_steps

    world.raise_together(_attempt(fill))
    partition.publish()
    return reader.record.progress


def _same_shapes(record: Record, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    for name in sorted(record.shapes.keys() | shapes.keys()):
        saved, here = record.shapes.get(name), shapes.get(name)
        if saved != here:
            raise CheckpointError(f"{folder}: parameter {name} has shape {saved}, the model's has {here}.")
