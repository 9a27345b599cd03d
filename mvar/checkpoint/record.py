"""checkpoint.json: what a checkpoint holds, which run saved it at which point, and whether a run may go on from it.

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

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from mvar.checkpoint.ownership import Ownership, holders
from mvar.checkpoint.partition import KINDS
from mvar.checkpoint.tensors import FileRecord
from mvar.config import ModelConfig, TrainConfig
from mvar.errors import CheckpointError
from mvar.files.disk import tree_digest
from mvar.schedule import BatchPhase

FORMAT_VERSION = 3
RECORD = "checkpoint.json"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class KnownSteps:
    """What a training knew of its last good steps, by which it tells a bad one (see mvar.training.stability)."""

    loss: tuple[float, ...]
    grad_norm: tuple[float, ...]
    scales: int
    """How many scales these steps learned from."""
    bad_in_a_row: int
    """Steps, up to the last one."""


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
    stretches: tuple[BatchPhase, ...] = ()
    """The global batches of the run, one after the other; empty: that of the configuration from the beginning. The name
    is that of the files, since their first format."""
    validation_loss: float | None = None
    """Mean cross entropy of a validation after this very step, if there was one."""
    known_steps: KnownSteps | None = None
    """None: saved by an mvar that kept it to itself."""
    ema_updates: int | None = None
    """How often the moving average moved. None: there is none, or it is from before it warmed up, and goes on so."""


class CheckpointRecord(pydantic.BaseModel):
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
    ownership: Ownership = {}
    """Which ranks hold which elements of the flattened parameter; from format 3 on."""
    pieces: dict[str, list[tuple[str, int, int]]] = {}
    """The same up to format 2: parameter -> (file, first element, one past the last), a row for each rank."""
    files: dict[str, FileRecord]
    versions: dict[str, str]

    def text(self) -> str:
        """JSON with its own SHA-256, so that a flipped bit in it shows."""
        # An older mvar, which may be the one that reads a record of its format, knows neither of the two keys it lacks.
        absent = {key for key in ("ownership", "pieces") if not getattr(self, key)}
        tree = self.model_dump(mode="json", exclude=absent)
        return json.dumps(tree | {"sha256": tree_digest(tree)}, indent=1)

    def holders(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(file, first element in it, one past the last) of the files with elements [start, stop) of a parameter."""
        for file, first, last in self.pieces.get(name, []):
            if first < stop and start < last:
                yield file, first, last
        for rank, first, last in holders(self.ownership.get(name, []), self.shapes.get(name, ()), start, stop):
            yield file_of(rank), first, last

    @classmethod
    def read(cls, folder: Path) -> CheckpointRecord:
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


def differences(record: CheckpointRecord, identity: Identity, *, change_batch: bool = False) -> list[str]:
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


def require_same(folder: Path, identity: Identity, *, change_batch: bool = False) -> CheckpointRecord:
    """The record of `folder`. Raises CheckpointError, with the keys, if `identity` is not the run that saved it."""
    record = CheckpointRecord.read(folder)
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


def file_of(rank: int) -> str:
    """Of a checkpoint's files, the one that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def key_of(name: str, kind: str) -> str:
    return f"{kind}/{name}"
