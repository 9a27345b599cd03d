"""Which checkpoints of a run are in order, which one it goes on with, and which ones are kept."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mvar.checkpoint.record import CheckpointRecord
from mvar.errors import CheckpointError
from mvar.files.disk import discard_folder
from mvar.log import log
from mvar.run.names import folder_of, steps_in
from mvar.run.world import World

DAMAGED, DIVERGED = "damaged", "diverged"
"""Why checkpoints are set aside, as it stands in their names."""
_ASIDE = re.compile(rf"step-(\d{{9,}})\.({DAMAGED}|{DIVERGED})(?:-(\d+))?")


def verify(folder: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check sizes, and digests unless told not to. `share` (i, n): only every n-th file from the i-th on.

    Raises CheckpointError that names the file.
    """
    record = CheckpointRecord.read(folder)
    for name in sorted(record.files)[share[0] :: share[1]]:
        problem = record.files[name].problem_of(folder / name, digest=digests)
        if problem is not None:
            raise CheckpointError(f"{folder / name}: {problem}.")


def problem_of(folder: Path, *, digests: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    try:
        verify(folder, digests=digests, share=share)
    except CheckpointError as error:
        return str(error)
    return None


def _warn(_: Path, problem: str) -> None:
    log.warning("damaged checkpoint passed over: %s", problem)


def choose(checkpoints: Path, world: World, *, trust_sizes: bool = False) -> Path | None:
    """The newest checkpoint that verifies, the same for all ranks; None if there is none. Ranks share the reading.

    A damaged one is set aside as `step-....damaged` with a loud line.
    """

    def problem(folder: Path) -> str | None:
        mine = problem_of(folder, digests=not trust_sizes, share=(world.rank, world.size))
        return next((text for text in world.gather(mine) if text), None)

    def damaged(folder: Path, text: str) -> None:
        if world.is_main:
            aside = _set_aside(folder, DAMAGED)
            log.warning("damaged checkpoint set aside as %s: %s", aside.name, text)

    return newest_good(checkpoints, world.share(steps_in(checkpoints)), problem, damaged)


def newest_good(
    checkpoints: Path,
    steps: Sequence[int],
    problem: Callable[[Path], str | None] = problem_of,
    damaged: Callable[[Path, str], None] = _warn,
) -> Path | None:
    """The newest checkpoint of `steps` (rising) without a `problem`; `damaged` is told of each newer one's."""
    for step in reversed(steps):
        folder = folder_of(checkpoints, step)
        text = problem(folder)
        if text is None:
            return folder
        damaged(folder, text)
    return None


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Set checkpoints of later steps than `step` aside as `step-....diverged`."""
    for late in steps_in(checkpoints):
        if late > step:
            _set_aside(folder_of(checkpoints, late), DIVERGED)


def _set_aside(folder: Path, why: str) -> Path:
    number = 0
    while (aside := folder.with_name(f"{folder.name}.{why}" + (f"-{number}" if number else ""))).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def retain(checkpoints: Path, *, last: int, every: int = 0, best: bool = False) -> None:
    """Remove all checkpoints but the newest `last`, those of every `every`-th step, and the `best` validated one.

    The newest one that is in order is never removed. Of those that were set aside the newest of each kind is kept.
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
        for folder in [folder_of(checkpoints, step) for step in steps if step not in kept] + _old_aside(checkpoints):
            discard_folder(folder)
    except OSError as error:  # Too many checkpoints are no reason to end a training.
        log.warning("an old checkpoint cannot be removed: %s", error)


def _old_aside(checkpoints: Path) -> list[Path]:
    """What was set aside, without the newest of each kind."""
    old = []
    for why in (DAMAGED, DIVERGED):
        entries = [(_ASIDE.fullmatch(entry.name), entry) for entry in checkpoints.iterdir() if entry.is_dir()]
        found = [(entry.stat().st_mtime, int(m[1]), int(m[3] or 0), entry) for m, entry in entries if m and m[2] == why]
        old += [entry for *_, entry in sorted(found)[:-1]]
    return old


def _best_of(checkpoints: Path, steps: list[int]) -> set[int]:
    """The step with the lowest validation loss, if any was validated."""
    losses: dict[int, float] = {}
    for step in steps:
        with contextlib.suppress(CheckpointError):
            loss = CheckpointRecord.read(folder_of(checkpoints, step)).progress.validation_loss
            if loss is not None:
                losses[step] = loss
    return {min(losses, key=lambda step: (losses[step], step))} if losses else set()
