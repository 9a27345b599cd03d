"""Damaged pictures in a tokenizer's training: left out up to a limit, with the next whole one in place of each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mvar.errors import ConfigError, ImageError
from mvar.files.disk import write_text
from mvar.images.pixels import DamagedImageError
from mvar.images.sources import Item, Source
from mvar.run.world import World

T = TypeVar("T")


class LeftOut:
    """The damaged pictures that were met, by path, with the reasons; at most `limit`.

    Threads share it. What stands in for a damaged picture depends on the pictures alone, not on who met it first.
    """

    def __init__(self, limit: int = 0, known: Mapping[str, str] | None = None) -> None:
        self.limit = limit
        self.reasons = dict(known or {})
        self._agreed = set(self.reasons)
        self._mutex = threading.Lock()

    @property
    def unshared(self) -> int:
        """How many were met here since all ranks agreed on them."""
        return len(self.reasons) - len(self._agreed)

    def whole(self, items: Sequence[Item], index: int, make: Callable[[int], T]) -> tuple[int, T]:
        """`make` of the first item from `index` on (after the last comes the first) that is whole, and its index.

        Raises ImageError: more are damaged than may be left out, or all of these, or one cannot be read at all.
        """
        for step in range(len(items)):
            place = (index + step) % len(items)
            if items[place].path in self.reasons:
                continue
            try:
                return place, make(place)
            except DamagedImageError as error:
                self._add(items[place].path, error)
        raise ImageError(f"all {len(items)} pictures of a split are damaged, such as {items[index].path}. Mend them.")

    def agree(self, world: World) -> dict[str, str]:
        """Put together what all ranks met; gives what is new. All ranks together, with one result."""
        everywhere: dict[str, str] = {}
        for reasons in world.gather(dict(self.reasons)):
            everywhere |= reasons
        new = {path: reason for path, reason in everywhere.items() if path not in self._agreed}
        with self._mutex:
            self.reasons |= everywhere
            self._agreed = set(everywhere)
        return new

    def excess(self) -> ImageError | None:
        """The error if more were met than may be left out."""
        return _too_many(self.reasons, self.limit) if len(self.reasons) > self.limit else None

    def _add(self, path: str, damage: DamagedImageError) -> None:
        if self.limit == 0:
            raise damage
        with self._mutex:
            self.reasons[path] = damage.reason
            excess = self.excess()
        if excess is not None:
            raise excess


def read_left_out(path: Path, source: Source) -> dict[str, str]:
    """What an earlier part of a training left out, as far as it is in the source still. Raises ConfigError."""
    try:
        tree = json.loads(path.read_bytes())
        reasons = {str(name): str(reason) for name, reason in tree.items()}
        there = {item.path for items in source.splits.values() for item in items if item.path in reasons}
        return {name: reason for name, reason in reasons.items() if name in there}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Remove it; damaged pictures are found again.") from None


def write_left_out(path: Path, reasons: Mapping[str, str]) -> None:
    """Write what is left out. Raises WriteError."""
    write_text(path, json.dumps(reasons, indent=1, sort_keys=True) + "\n")


def _too_many(reasons: Mapping[str, str], limit: int) -> ImageError:
    listed = "\n  ".join(f"{path} ({reason})" for path, reason in sorted(reasons.items())[:20])
    return ImageError(
        f"{len(reasons)} pictures are damaged, skip_bad={limit} allows fewer:\n  {listed}\nAllow more (skip_bad=N), or "
        "remove them and go on with other_images=true. The same command goes on from the last state."
    )
