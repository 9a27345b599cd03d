"""A plain list of images: one line `path,label` or `path,label,split` for each."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mvar.errors import ImageError
from mvar.images.sources import SPLITS, Contents, Entry, Item, file_keys, text_lines
from mvar.images.splits import role_of
from mvar.images.walk import evidence_of, printable


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


def look_into(path: Path, class_names: tuple[str, ...] | None = None) -> Contents:
    """The images that a CSV file lists. Relative paths begin at its folder; a first line `path,label` is a header.

    Labels that are all numbers are the class indices, from 0; `class_names` may then name them. Other labels are names,
    and classes are numbered in their sorted order. `split` is train (default) or val, as `role_of` reads them. Raises
    ImageError.
    """
    where, evidence = f"list {path}", {}
    rows = _rows(path)
    evidence[str(path)] = evidence_of(path)
    numbers = all(row.label.isdecimal() for row in rows)
    if numbers:
        trained = Counter(int(row.label) for row in rows if row.split == "train")
        classes = numbered_classes(trained, max(int(row.label) for row in rows) + 1, class_names, where)
    else:
        classes = class_names or tuple(sorted({printable(row.label) for row in rows}))
    labels = {name: label for label, name in enumerate(classes)}
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    keys = file_keys([os.path.normpath(row.path).lstrip("/") for row in rows])
    for key, row in zip(keys, rows, strict=True):
        if not numbers and printable(row.label) not in labels:
            raise ImageError(f"{path}, line {row.line}: {row.label!r} is none of the given class names.")
        image = os.path.join(path.parent, row.path)
        label = int(row.label) if numbers else labels[printable(row.label)]
        size = _size(path, row, image)
        entries[row.split].append(Entry(Item(key, image, label, size), size))
    return Contents("list", where, classes, entries, untrained(classes, entries["train"]), evidence)


def numbered_classes(
    trained: Mapping[int, int], count: int, names: tuple[str, ...] | None, where: str
) -> tuple[str, ...]:
    """Names of the classes 0 to `count` - 1: `names`, which may be more, or without them the numbers.

    `trained`: training images of each label. Without `names` nothing else tells how many classes there are, so labels
    that leave most classes empty, or class 0, are taken for a mistake. Raises ImageError.
    """
    if names is not None:
        if len(names) < count:
            raise ImageError(f"{where}: labels up to {count - 1}, but only {len(names)} class names were given.")
        return names
    mend = "Number the classes from 0, or name them all, one a line, in class_names=FILE."
    if trained and 0 not in trained:
        raise ImageError(f"{where}: labels begin at {min(trained)}; class 0 would have no image to train on. {mend}")
    if 2 * len(trained) < count:
        raise ImageError(
            f"{where}: labels up to {count - 1} make {count:,} classes, of which only {len(trained):,} have an image "
            f"to train on. {mend}"
        )
    return tuple(str(label) for label in range(count))


def untrained(classes: tuple[str, ...], entries: list[Entry]) -> tuple[str, ...]:
    """A note where classes have no image to train on."""
    empty = sorted(set(range(len(classes))) - {entry.item.label for entry in entries})
    if not empty:
        return ()
    return (f"{len(empty):,} of {len(classes):,} classes have no image to train on, such as {classes[empty[0]]!r}",)


def _rows(path: Path) -> list[_Row]:
    rows = []
    for number, fields in enumerate(csv.reader(text_lines(path, names=True)), start=1):
        cells = [field.strip() for field in fields]
        if number == 1 and cells[:2] == ["path", "label"]:
            continue
        image, label, told = (*cells, "train")[:3] if len(cells) in (2, 3) else ("", "", "")
        split = role_of(told)
        if not image or not label or split not in SPLITS:
            raise ImageError(f"{path}, line {number}: expected `path,label` or `path,label,train|val`, got {fields}.")
        rows.append(_Row(number, image, label, split))
    if not rows:
        raise ImageError(f"list {path}: no images. Expected lines `path,label`.")
    return rows


def _size(path: Path, row: _Row, image: str) -> int:
    try:
        return os.stat(image).st_size
    except OSError as error:
        raise ImageError(f"{path}, line {row.line}: image {image} cannot be read ({error.strerror}).") from None
