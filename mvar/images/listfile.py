"""A plain list of images: one line `path,label` or `path,label,split` for each."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import NamedTuple

from mvar.errors import ImageError
from mvar.images.pixels import Background, FileReader
from mvar.images.sources import SPLITS, Entry, Item, Listing, file_keys, text_lines


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


class ListFile(Listing):
    """The images that a CSV file lists. Relative paths begin at its folder; a first line `path,label` is a header.

    Labels that are all numbers are the class indices; `class_names` may then name them. Other labels are names, and
    classes are numbered in their sorted order. `split` is train (default) or val. Raises ImageError.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        val_fraction: float = 0.0,
        background: Background = "white",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        path = Path(path)
        rows = _rows(path)
        numbers = all(row.label.isdecimal() for row in rows)
        if numbers:
            classes = numbered_classes(max(int(row.label) for row in rows) + 1, class_names, f"list {path}")
        else:
            classes = class_names or tuple(sorted({row.label for row in rows}))
        labels = {name: label for label, name in enumerate(classes)}
        entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        keys = file_keys([os.path.normpath(row.path).lstrip("/") for row in rows])
        for key, row in zip(keys, rows, strict=True):
            if not numbers and row.label not in labels:
                raise ImageError(f"{path}, line {row.line}: {row.label!r} is none of the given class names.")
            image = os.path.join(path.parent, row.path)
            label = int(row.label) if numbers else labels[row.label]
            entries[row.split].append(Entry(Item(key, image, label), _size(path, row, image)))
        super().__init__("list", f"list {path}", classes, entries, FileReader(background), val_fraction)


def numbered_classes(count: int, names: tuple[str, ...] | None, where: str) -> tuple[str, ...]:
    """`names`, if there are enough for labels below `count`; without them the numbers. Raises ImageError."""
    if names is None:
        return tuple(str(label) for label in range(count))
    if len(names) < count:
        raise ImageError(f"{where}: labels up to {count - 1}, but only {len(names)} class names were given.")
    return names


def _rows(path: Path) -> list[_Row]:
    rows = []
    for number, fields in enumerate(csv.reader(text_lines(path)), start=1):
        cells = [field.strip() for field in fields]
        if number == 1 and cells[:2] == ["path", "label"]:
            continue
        image, label, split = (*cells, "train")[:3] if len(cells) in (2, 3) else ("", "", "")
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
