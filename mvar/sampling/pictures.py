"""Which images a job draws, and in which order.

The images of a job are numbered from 0, class after class in turn (first image of each class, then the second, ...). So
any stretch of the order has all classes in it alike, as scores over parts of 50,000 images expect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mvar.errors import ConfigError

PER_CLASS = 8
"""Images of each class where nothing is asked for."""
BALANCED = "balanced"
Counts = dict[int, int]
"""Class -> images of it, classes rising."""


class Picture(NamedTuple):
    """One image to draw: its class, and its number among those of its class."""

    label: int
    number: int

    def path(self, out: Path) -> Path:
        """Where it lies in a folder of class folders."""
        return out / f"{self.label:04d}" / f"{self.number:05d}.png"

    def seed(self, base: int) -> int:
        """An image's own seed: 63 bits of a hash of the job's seed, its class and its number."""
        digest = hashlib.sha256(f"{base}:{self.label}:{self.number}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1


def in_turn(counts: Mapping[int, int]) -> list[Picture]:
    """All images in their order."""
    return sorted(
        (Picture(label, number) for label, count in counts.items() for number in range(count)),
        key=lambda picture: (picture.number, picture.label),
    )


def counts_of(classes: Sequence[int], per_class: str | None, total: int | None) -> Counts:
    """How many images of each class: the meaning of --classes, --per-class and --num. Raises ConfigError.

    `per_class`: a number for all, numbers for each in the order of `classes`, or "balanced": `total` shared out, the
    lowest classes taking one more each where that does not come out even.
    """
    if per_class is None:
        per_class = str(PER_CLASS) if total is None else BALANCED
    if total is not None and total < 1:
        raise ConfigError(f"--num {total}: expected a number of images, from 1.")
    if per_class == BALANCED:
        if total is None:
            raise ConfigError(f"--per-class {BALANCED}: how many images in all? Give --num.")
        each, more = divmod(total, len(classes))
        shared = {label: each + (place < more) for place, label in enumerate(sorted(classes))}
        return {label: count for label, count in shared.items() if count}
    numbers = _numbers(per_class)
    if len(numbers) not in (1, len(classes)):
        raise ConfigError(f"--per-class {per_class}: {len(numbers)} numbers for {len(classes)} classes.")
    numbers = numbers * len(classes) if len(numbers) == 1 else numbers
    if total is not None and sum(numbers) != total:
        raise ConfigError(
            f"--num {total}: --per-class {per_class} makes {sum(numbers)} images of {len(classes)} classes. Leave out "
            f"one of them, or give --per-class {BALANCED}."
        )
    return dict(sorted(zip(classes, numbers, strict=True)))


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"--per-class {text}: expected whole numbers from 1 (one for all classes, or one for each), or {BALANCED}."
        )
    return [int(part) for part in parts]
