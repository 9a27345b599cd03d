"""Writing a checkpoint: every rank its part under a temporary name, then the name that says it is complete."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mvar.checkpoint.ownership import Ownership, numbers_of, ownership_of
from mvar.checkpoint.partition import Partition
from mvar.checkpoint.record import CONFIG, FORMAT_VERSION, RECORD, CheckpointRecord, Identity, Progress, file_of, key_of
from mvar.checkpoint.tensors import FileRecord, write_tensors
from mvar.errors import CheckpointError
from mvar.files.disk import cannot_write, publish_folder, remove_tree, synced, write_text
from mvar.run.names import folder_of
from mvar.run.world import World
from mvar.settings import dump


class Draft:
    """A checkpoint that is being made. It exists only after `commit`.

    `begin`, `commit` and `abandon` are called by all ranks together; if one fails, all raise. `write` is each rank's
    own affair, in whatever thread.
    """

    def __init__(
        self,
        checkpoints: Path,
        partition: Partition,
        world: World,
        progress: Progress,
        identity: Identity,
        ownership: Ownership | None,
    ) -> None:
        """`ownership`: by `gathered`."""
        self._partition, self._world, self._progress, self._identity = partition, world, progress, identity
        self._ownership = ownership
        self.final = folder_of(checkpoints, progress.step)
        self._temporary = checkpoints / f".tmp-{self.final.name}"
        self._written: FileRecord | None = None
        self._error: BaseException | None = None

    def begin(self, sync_records: Callable[[], None] = lambda: None) -> None:
        """Make the temporary folder, if there is room for the checkpoint. Raises CheckpointError, WriteError.

        `sync_records`: called on rank 0 before anything else, for what must not be older on disk than the checkpoint.
        """
        self._world.raise_together(self._attempt(lambda: self._prepare(sync_records)) if self._world.is_main else None)

    def _prepare(self, sync_records: Callable[[], None]) -> None:
        sync_records()
        remove_tree(self._temporary)
        self._temporary.mkdir(parents=True, exist_ok=True)  # NFS may keep a file in it for whoever has it open.
        needed = self._partition.bytes_of_all
        free = shutil.disk_usage(self._temporary).free
        if free < needed:
            raise CheckpointError(
                f"{self._temporary.parent}: a checkpoint takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are"
                " free. Free space; run again."
            )

    def write(self, values: Iterable[Tensor]) -> None:
        """Write this rank's part: `values` in the order of the partition's layout. `commit` tells of errors."""
        self._error = self._attempt(lambda: self._write(values))

    def _write(self, values: Iterable[Tensor]) -> None:
        layout = self._partition.layout()
        shapes: list[tuple[str, tuple[int, ...]]] = [(key_of(p.name, kind), (p.count,)) for p, kind in layout]
        with synced(self._temporary / file_of(self._world.rank)) as file:
            self._written = write_tensors(file, shapes, values, {"step": str(self._progress.step)})

    def commit(self) -> Path:
        """Give the folder its name, once every rank has written. Raises WriteError."""
        self._world.raise_together(self._error)
        assert self._written is not None
        written = self._world.gather_to_main(self._written)
        self._world.raise_together(self._attempt(lambda: self._publish(written)) if written is not None else None)
        return self.final

    def _publish(self, written: list[FileRecord]) -> None:
        assert self._ownership is not None
        files = {file_of(rank): record for rank, record in enumerate(written)}
        files[CONFIG] = _write_synced(self._temporary / CONFIG, dump(self._identity.config))
        record = CheckpointRecord(
            format_version=FORMAT_VERSION,
            progress=self._progress,
            config=self._identity.config.model_dump(mode="json"),
            model=self._identity.model.model_dump(mode="json"),
            store=self._identity.store,
            world_size=self._world.size,
            zero_stage=self._partition.stage,
            kinds=self._partition.kinds,
            shapes=self._partition.shapes,
            ownership=self._ownership,
            files=files,
            versions=self._identity.versions,
        )
        _write_synced(self._temporary / RECORD, record.text())
        # One that has the name was saved before, is damaged since, and was passed over when this run started.
        publish_folder(self._temporary, self.final)

    def _attempt(self, action: Callable[[], object]) -> BaseException | None:
        """Run `action`; the error, if any, instead of raising it. A full disk becomes a WriteError."""
        try:
            action()
        except OSError as error:
            return cannot_write(self.final, error)
        except Exception as error:
            return error
        return None

    def validated(self, loss: float) -> None:
        """Before `commit`: the validation loss of this step, for its record."""
        self._progress = replace(self._progress, validation_loss=loss)

    def abandon(self) -> None:
        if self._world.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)


def note_validation(folder: Path, loss: float) -> None:
    """Write the validation loss of its step into the record of a checkpoint that exists. Raises MvarError."""
    record = CheckpointRecord.read(folder)
    record = record.model_copy(update={"progress": replace(record.progress, validation_loss=loss)})
    write_text(folder / RECORD, record.text())


def save(checkpoints: Path, partition: Partition, world: World, progress: Progress, identity: Identity) -> Path:
    """Write the checkpoint of `progress.step`; all ranks together. Returns its folder.

    If any rank fails, all raise, and nothing but complete checkpoints remains.
    """
    draft = Draft(checkpoints, partition, world, progress, identity, gathered(partition, world))
    try:
        draft.begin()
        draft.write(values for _, _, values in partition.blocks())
        return draft.commit()
    except BaseException:
        draft.abandon()
        raise


def gathered(partition: Partition, world: World) -> Ownership | None:
    """What all ranks hold together, on rank 0, which writes it down. All ranks; it stays so as long as they run."""
    parts = world.gather_to_main(numbers_of(partition.owned, list(partition.shapes)))
    return None if parts is None else ownership_of(parts, partition.shapes)


def _write_synced(path: Path, text: str) -> FileRecord:
    data = text.encode()
    with synced(path) as file:
        file.write(data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())
