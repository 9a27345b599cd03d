"""Which checkpoints of a run are in order, which one it goes on with, and which ones are kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mvar.checkpoint.record import Record
from mvar.errors import CheckpointError
from mvar.files.disk import discard_folder, sha256_of
from mvar.log import log
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World


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
            log.warning("damaged checkpoint set aside as %s: %s", aside.name, problems[0])
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
                discard_folder(folder_of(checkpoints, step))
    except OSError as error:  # Too many checkpoints are no reason to end a training.
        log.warning("an old checkpoint cannot be removed: %s", error)


def _best_of(checkpoints: Path, steps: list[int]) -> set[int]:
    """The step with the lowest validation loss, if any was validated."""
    losses: dict[int, float] = {}
    for step in steps:
        with contextlib.suppress(CheckpointError):
            loss = Record.read(folder_of(checkpoints, step)).progress.validation_loss
            if loss is not None:
                losses[step] = loss
    return {min(losses, key=lambda step: (losses[step], step))} if losses else set()
