"""Names of checkpoints in a run folder, complete and left over, for those who look with torch and those without."""

from __future__ import annotations

import re
from pathlib import Path

from mvar.files.disk import remove_tree

CLAIM = "run"
"""Name of the claim on a run folder (see mvar.run.claims)."""
_NAME = re.compile(r"step-(\d{9,})")


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:09d}"


def steps_in(checkpoints: Path) -> list[int]:
    """Steps of all complete checkpoints, rising."""
    if not checkpoints.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in checkpoints.iterdir())
    return sorted(int(name[1]) for name in names if name)


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint, by name: it is not verified. None without one."""
    return max(steps_in(checkpoints), default=None)


def is_leftover(entry: Path) -> bool:
    """Whether it is what a killed process left half-written or half-removed."""
    return entry.name.startswith((".tmp-", ".trash-"))


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed processes left, as far as nobody has it open. Raises OSError."""
    if checkpoints.is_dir():
        for entry in filter(is_leftover, list(checkpoints.iterdir())):
            remove_tree(entry)
