"""What a user asks a gallery for: the fields of its form, what they mean, and the command that draws the same.

Everything is text until `wish_of` reads it, with the readers that the command line has.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mvar.errors import ConfigError
from mvar.gallery.entries import Exhibit
from mvar.images.arrays import Bytes, grid
from mvar.sampling.arguments import sampling_options
from mvar.sampling.classes import parse_classes
from mvar.sampling.gallery import shown
from mvar.sampling.options import DEFAULTS, SamplingOptions
from mvar.sampling.pictures import Counts, Picture

MOST = 64
"""Images that one click draws."""


@dataclass(frozen=True)
class HowFields:
    """How pictures are drawn, as it is typed."""

    cfg: str = str(DEFAULTS.cfg)
    guidance: str = DEFAULTS.guidance
    cfg_scales: str = ""
    top_k: str = str(DEFAULTS.top_k)
    top_p: str = str(DEFAULTS.top_p)
    temperature: str = str(DEFAULTS.temperature)
    smooth: bool = DEFAULTS.smooth

    def options(self) -> SamplingOptions:
        """Raises ConfigError."""
        texts = {key: value.strip() if isinstance(value, str) else value for key, value in vars(self).items()}
        return sampling_options(argparse.Namespace(**texts | {"cfg_scales": texts["cfg_scales"] or None}))

    @property
    def flags(self) -> list[str]:
        """Of `mvar sample`: those that are not its defaults."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            if value != field.default:
                words += [flag] if value is True else [flag, value.strip()]
        return words


@dataclass(frozen=True)
class Wish:
    """Pictures to draw, one row of a sheet for each class."""

    counts: Counts
    seed: int
    options: SamplingOptions

    @cached_property
    def pictures(self) -> list[Picture]:
        """In the order of the sheet, row by row: all are drawn together, as `mvar sample --no-images` draws a grid."""
        return shown(self.counts, len(self.counts), max(self.counts.values()))

    @property
    def seeds(self) -> list[int]:
        return [picture.seed(self.seed) for picture in self.pictures]

    def sheet(self, images_BHWC: Bytes) -> Bytes:
        """As `mvar sample --grid` lays it out."""
        return grid(np.asarray(images_BHWC), max(self.counts.values()))


def wish_of(
    classes: str, per_class: float, seed: float, how: HowFields, num_classes: int, names: Sequence[str] | None
) -> Wish:
    """Raises ConfigError, in words of the form's fields."""
    if seed is None or int(seed) != seed:
        raise ConfigError(f"seed {seed}: expected a whole number.")
    if per_class is None or int(per_class) != per_class or per_class < 1:
        raise ConfigError(f"images of each class {per_class}: expected a whole number from 1.")
    chosen = parse_classes(classes.strip(), num_classes, names)
    if len(chosen) * per_class > MOST:
        raise ConfigError(
            f"{len(chosen)} classes with {int(per_class)} images each are more than the {MOST} images of one click. "
            "Ask for fewer, or draw them with mvar sample."
        )
    return Wish({label: int(per_class) for label in sorted(chosen)}, int(seed), how.options())


def edit_wish_of(
    label: str, count: float, seed: float, how: HowFields, num_classes: int, names: Sequence[str] | None
) -> Wish:
    """Pictures of one class, or of none where the field is empty. Raises ConfigError."""
    if label.strip():
        found = wish_of(label, count, seed, how, num_classes, names)
        if len(found.counts) > 1:
            raise ConfigError(f"class {label.strip()}: expected one class, or none.")
        return found
    found = wish_of("0-0", count, seed, how, num_classes, names)
    return dataclasses.replace(found, counts={num_classes: found.counts[0]})


def command_line(
    entry: Exhibit, wish: Wish, how: HowFields, names: Sequence[str] | None = None, more: Sequence[str] = ()
) -> str:
    """The command that writes the very bytes of the downloaded sheet. `more`: flags of the machine."""
    per_class = max(wish.counts.values())
    classes = ",".join(_written(label, names) for label in wish.counts)
    words = ["mvar", "sample", *entry.flags, "--classes", classes, "--per-class", str(per_class)]
    words += ["--seed", str(wish.seed), *how.flags, "--batch", str(len(wish.pictures)), *more, "--no-images"]
    words += ["--grid", "samples.png", "--grid-classes", str(len(wish.counts)), "--grid-per-class", str(per_class)]
    return shlex.join(words)


def edit_command_line(
    exhibit: Exhibit,
    wish: Wish,
    how: HowFields,
    num_classes: int,
    names: Sequence[str] | None = None,
    more: Sequence[str] = (),
) -> str:
    """The command that edits alike: with picture.png and mask.png, which the page gives."""
    ((label, count),) = wish.counts.items()
    words = ["mvar", "edit", *exhibit.flags, "--image", "picture.png", "--mask", "mask.png"]
    words += [] if label == num_classes else ["--class", _written(label, names)]
    words += ["--num", str(count), "--seed", str(wish.seed), *how.flags, *more, "--out", "edited"]
    return shlex.join(words)


def _written(label: int, names: Sequence[str] | None) -> str:
    """A class as `--classes` takes it: as a range where its number is the name of another class."""
    number = str(label)
    other = names is not None and number in names and names[label] != number
    return f"{number}-{number}" if other else number
