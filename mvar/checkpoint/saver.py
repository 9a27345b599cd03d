"""Checkpoints while training goes on: a snapshot in host memory, written by a thread, committed by all ranks together.

    save    every rank copies its part into host memory; a thread writes it into the checkpoint's temporary folder
    ended   in each step's one sum over ranks, every rank says whether its thread is done
    settle  when all are, the ranks exchange digests and rank 0 renames the folder: only now the checkpoint exists

The thread talks to no other rank, so nothing can get out of order. At most one checkpoint is under way: `save` first
waits for the one before. The snapshot's memory is allocated once, so it does not grow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from mvar.cgroups import memory_left
from mvar.checkpoint.partition import Partition
from mvar.checkpoint.record import Identity, Progress
from mvar.checkpoint.saving import Draft, gathered, note_validation
from mvar.checkpoint.snapshot import Snapshot
from mvar.config import CheckpointConfig
from mvar.errors import CheckpointError, MvarError, WriteError
from mvar.log import Chosen, log
from mvar.run.names import folder_of
from mvar.run.world import RemoteError, World
from mvar.threads import helper

SNAPSHOT_SHARE = 0.5
"""A machine's snapshots may take this share of the memory that is available."""


@dataclass(frozen=True)
class Saved:
    """One checkpoint, or one attempt that failed, as all ranks know it."""

    step: int
    seconds: float
    """From the call of `save` to its end."""
    stall_s: float
    """How long training stood still for it."""
    error: str | None = None


@dataclass
class _Flight:
    """A checkpoint under way."""

    draft: Draft
    step: int
    began: float
    stall_s: float = 0.0
    thread: threading.Thread | None = None


class Saver:
    """Writes the checkpoints of one run. `save` and `settle` are called by all ranks together."""

    def __init__(
        self,
        checkpoints: Path,
        partition: Partition,
        world: World,
        identity: Identity,
        settings: CheckpointConfig,
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        """By all ranks together. `sync_records`: called on rank 0 first; if it raises WriteError, the save failed."""
        self._checkpoints, self._partition, self._world, self._identity = checkpoints, partition, world, identity
        self._settings, self._sync_records = settings, sync_records
        self._ownership = gathered(partition, world)
        self._snapshot = Snapshot(partition, world.device)
        without = self._ranks_without_room() if settings.background == "auto" else 0
        self._background = settings.background == "auto" and not without
        self.chosen = Chosen("saving", "while training goes on" if self._background else "training waits")
        """How checkpoints are written."""
        if without:
            self.chosen = replace(self.chosen, reason=f"{without} ranks lack memory for a snapshot", slow=True)
        self._flight: _Flight | None = None

    @property
    def ended(self) -> bool:
        """This rank has written its part of the checkpoint under way, or failed to. All have: call `settle`."""
        return self._flight is not None and (self._flight.thread is None or not self._flight.thread.is_alive())

    def save(self, progress: Progress, *, last: bool = False) -> list[Saved]:
        """Take the checkpoint of `progress.step`; gives what came to its end during the call.

        `last`: wait until it exists, as a run does before it ends. Raises CheckpointError or WriteError (RemoteError on
        other ranks) when saving fails, unless `checkpoint.on_failure` is `go_on` and this is not the last one.
        """
        began = time.perf_counter()
        settled = self.settle()
        draft = Draft(self._checkpoints, self._partition, self._world, progress, self._identity, self._ownership)
        flight = _Flight(draft, progress.step, began)
        failed = self._attempt(flight, lambda: draft.begin(self._sync_records), last)
        if failed is not None:
            return [*settled, failed]
        if last or not self._background:
            draft.write(values for _, _, values in self._partition.blocks())
            return [*settled, self._commit(flight, began, last=last)]
        values = self._snapshot.take()
        flight.thread = helper(lambda: draft.write(values), "mvar-checkpoint")
        flight.stall_s = time.perf_counter() - began
        self._flight = flight
        return settled

    def settle(self) -> list[Saved]:
        """End the checkpoint under way, if any: wait for this rank's thread, then commit. Raises as `save`."""
        flight, self._flight = self._flight, None
        if flight is None or flight.thread is None:
            return []
        since = time.perf_counter()
        flight.thread.join()
        return [self._commit(flight, since)]

    def validated(self, step: int, loss: float) -> None:
        """The validation loss of a step that was or is being saved, for its checkpoint. A failure does no harm."""
        if not self._world.is_main:
            return
        if self._flight is not None and self._flight.step == step:
            self._flight.draft.validated(loss)
            return
        folder = folder_of(self._checkpoints, step)
        if folder.is_dir():
            try:
                note_validation(folder, loss)
            except MvarError as error:
                log.warning("%s: its validation loss %.4f is not noted: %s", folder.name, loss, error)

    def _commit(self, flight: _Flight, since: float, *, last: bool = False) -> Saved:
        """`since`: from when on training has been waiting for this."""
        failed = self._attempt(flight, flight.draft.commit, last)
        if failed is not None:
            return failed
        now = time.perf_counter()
        return Saved(flight.step, now - flight.began, flight.stall_s + now - since)

    def _attempt(self, flight: _Flight, action: Callable[[], object], last: bool) -> Saved | None:
        """None, or what became of a save that failed on some rank: all ranks see it, and decide the same."""
        try:
            action()
        except (CheckpointError, WriteError, RemoteError) as error:
            flight.draft.abandon()
            expected = not isinstance(error, RemoteError) or error.expected
            if last or not expected or self._settings.on_failure == "stop":
                raise
            if self._world.is_main:
                log.warning("step %d was not saved: %s", flight.step, error)
            seconds = time.perf_counter() - flight.began
            return Saved(flight.step, seconds, flight.stall_s, str(error))
        return None

    def _ranks_without_room(self) -> int:
        """How many ranks are on machines that have no room for the snapshots of theirs."""
        needed = self._partition.bytes_owned * self._world.place.local_size
        room = needed <= SNAPSHOT_SHARE * available_memory()
        return int(self._world.sum(torch.tensor([int(not room)]))[0])


def available_memory() -> int:
    """Bytes that this process may still allocate: of the machine, or of its control groups if that is less."""
    free, left = int(psutil.virtual_memory().available), memory_left()
    return free if left is None else min(free, left)
