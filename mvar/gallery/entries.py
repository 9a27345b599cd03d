"""Which checkpoints a gallery can draw from, and the tokenizer of each. Nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mvar.checkpoint.record import RECORD, CheckpointRecord
from mvar.errors import CheckpointError, ConfigError, MvarError
from mvar.run.names import folder_of, steps_in

NEWEST = 20
"""Checkpoints offered of one run, the newest."""


@dataclass(frozen=True)
class Exhibit:
    """One checkpoint or file of weights, as a user picks it."""

    label: str
    weights: Path
    """A run folder, a checkpoint folder or a file, as it was given."""
    tokenizer: Path
    step: int | None = None
    """Of a run folder's checkpoint."""
    ema: bool = False

    @property
    def flags(self) -> list[str]:
        """How `mvar sample` is told of it."""
        step = [] if self.step is None else ["--step", str(self.step)]
        tokenizer = ["--tokenizer", str(self.tokenizer)]
        return ["--weights", str(self.weights), *step, *tokenizer, *(["--ema"] if self.ema else [])]


def entries_of(weights: Sequence[Path], tokenizers: Sequence[Path] = (), *, ema: bool = False) -> dict[str, Exhibit]:
    """By their labels: of run folders each kept checkpoint, the newest first.

    `tokenizers`: none (runs tell it), one for all, or one for each of `weights`. Raises MvarError.
    """
    if len(tokenizers) not in (0, 1, len(weights)):
        raise ConfigError(
            f"--tokenizer: {len(tokenizers)} files for {len(weights)} --weights. Give none, one for all, or one "
            "for each."
        )
    found: dict[str, Exhibit] = {}
    names = [path.resolve().name for path in weights]
    for place, path in enumerate(weights):
        if not path.exists():
            raise CheckpointError(f"--weights {path}: no such file or folder.")
        # Two runs of one name are told apart by their folders.
        name = names[place] if names.count(names[place]) == 1 else str(path)
        given = tokenizers[place % len(tokenizers)] if tokenizers else None
        steps = steps_in(path / "checkpoints")[-NEWEST:]
        own: list[tuple[str, int | None]] = [(f"{name}, step {step:,}", step) for step in reversed(steps)] or [
            (name, None)
        ]
        tokenizer = _tokenizer(path, steps[-1] if steps else None, given)
        found |= {label: Exhibit(label, path, tokenizer, step, ema) for label, step in own}
    return found


def _tokenizer(weights: Path, newest: int | None, given: Path | None) -> Path:
    """Raises ConfigError: nothing tells it, or it is not there."""
    if given is None:
        folder = weights if newest is None else folder_of(weights / "checkpoints", newest)
        named = None
        if (folder / RECORD).is_file():
            try:
                named = CheckpointRecord.read(folder).config.get("data", {}).get("tokenizer")
            except MvarError:
                named = None
        if not named:
            raise ConfigError(
                f"--weights {weights}: nothing tells which tokenizer it goes with. Give --tokenizer FILE."
            )
        given = Path(str(named))
    if not given.is_file():
        raise ConfigError(f"--weights {weights}: its tokenizer {given} is not there. Give --tokenizer FILE.")
    return given
