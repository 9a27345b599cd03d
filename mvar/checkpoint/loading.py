"""Reading checkpoints: any elements of any parameter, and the whole state into a running partition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mvar.checkpoint.partition import WEIGHT, Partition, Piece
from mvar.checkpoint.record import CheckpointRecord, key_of
from mvar.errors import CheckpointError
from mvar.run.world import World


class CheckpointReader:
    """Any elements of any parameter of a checkpoint, from whatever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = CheckpointRecord.read(folder)
        self._files: dict[str, Any] = {}

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, float32. Raises CheckpointError."""
        values = torch.empty(stop - start)
        missing = stop - start
        for file, first, last in self.record.holders(name, start, stop):
            low, high = max(start, first), min(stop, last)
            values[low - start : high - start] = self._slice(file, key_of(name, kind), low - first, high - first)
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


def restore(folder: Path, partition: Partition, world: World) -> CheckpointRecord:
    """Load weights, moments and AdamW's count; all ranks together. Raises CheckpointError if the model differs."""
    reader = CheckpointReader(folder)
    _same_shapes(reader.record, partition.shapes, folder)

    def values(piece: Piece, kind: str) -> Tensor:
        # A moving average that is wanted from here on begins at the weights.
        return reader.read(piece.name, kind if kind in reader.record.kinds else WEIGHT, piece.start, piece.stop)

    def fill() -> None:
        partition.fill(values)
        partition.adam_steps = reader.record.progress.adam_steps

    world.together(fill)
    partition.publish()
    return reader.record


def _same_shapes(record: CheckpointRecord, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    for name in sorted(record.shapes.keys() | shapes.keys()):
        saved, here = record.shapes.get(name), shapes.get(name)
        if saved != here:
            raise CheckpointError(f"{folder}: parameter {name} has shape {saved}, the model's has {here}.")
