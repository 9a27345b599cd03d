"""Where images come from: a listing of labelled images, and a reader that turns one of them into RGB pixels.

A source lists once and reads many times. Everything that works on images (tokenizing, tokenizer training, evaluation)
sees only `Source`; `Listing` does what all layouts share. Here is the folder layout, `listfile` and `archives` have the
others, `layouts` picks one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from mvar.errors import ImageError
from mvar.images.pixels import AS_PUBLISHED, FileReader, Rules
from mvar.images.splits import split_folders
from mvar.images.walk import IMAGE_SUFFIXES, Evidence, Found, Walk, printable
from mvar.log import log

SPLITS = ("train", "val")
MAX_KEY = 88
"""Characters of a key, at most."""
VAL_LABELS = ("LOC_val_solution.csv", "val_labels.txt", "val.txt", "val_annotations.txt")
"""Where the labels of validation images without class folders are looked for: beside val/, then in it."""


class Item(NamedTuple):
    """One labelled image. `key` is unique in its split and safe inside a tar; `path` means something to the reader.

    `bytes`: of the file when it was listed, where that is known.
    """

    key: str
    path: str
    label: int
    bytes: int | None = None


class Fingerprint(NamedTuple):
    """What a listing held, cheaply: changes when a file is added, removed, renamed, or changes its size."""

    kind: str
    images: int
    bytes: int
    sha256: str


class Reader(Protocol):
    """Turns a location (an item's `path`) into a picture. Small enough to be sent to worker processes."""

    def __call__(self, path: str | Path, size_bytes: int | None = None) -> Image.Image:
        """Mode RGB; `size_bytes`: an item's `bytes`, to notice a file that changed. Raises ImageError."""


class Source(Protocol):
    """A finite, ordered set of labelled images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names; an item's label is an index into them."""

    @property
    def splits(self) -> Mapping[str, tuple[Item, ...]]:
        """Items of `train`, and of `val` (which may be empty), in a fixed order."""

    @property
    def fingerprint(self) -> Fingerprint: ...

    @property
    def reader(self) -> Reader: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the listing, such as what was left out: a line each."""


class Entry(NamedTuple):
    """A listed image and its size."""

    item: Item
    bytes: int


class Contents(NamedTuple):
    """All that looking at a source gives; the rest follows without another look.

    `where`: the source in words. `entries`: of the splits that the source has. `evidence`: what tells a change of it.
    """

    kind: str
    where: str
    classes: tuple[str, ...]
    entries: Mapping[str, list[Entry]]
    notes: tuple[str, ...]
    evidence: Evidence

    def fingerprint(self) -> Fingerprint:
        """Of names, labels and sizes of all images, in their order."""
        digest, images, total_bytes = hashlib.sha256(), 0, 0
        for split, own in self.entries.items():
            images, total_bytes = images + len(own), total_bytes + sum(entry.bytes for entry in own)
            digest.update(f"{split}\n".encode())
            digest.update("".join(f"{item.key}\t{item.label}\t{size}\n" for item, size in in_order(own)).encode())
        digest.update("\n".join(self.classes).encode())
        return Fingerprint(self.kind, images, total_bytes, digest.hexdigest())


def in_order(entries: list[Entry]) -> list[Entry]:
    """Sorted by (label, key)."""
    return sorted(entries, key=lambda entry: (entry.item.label, entry.item.key))


class Listing:
    """A source from a list of images: sorts it by (label, key), fingerprints it, and splits it.

    Without entries for `val`, `val_fraction` of the images, picked by a hash of their keys (so that adding images moves
    no other), becomes that split. Raises ImageError when two images share a key or nothing is left to train on.
    """

    def __init__(self, contents: Contents, reader: Reader, val_fraction: float) -> None:
        self.contents = contents
        self.classes = contents.classes
        self.notes = contents.notes
        self.reader = reader
        self.fingerprint = contents.fingerprint()
        entries = contents.entries
        splits: dict[str, tuple[Item, ...]] = {"val": ()}
        for split, own in entries.items():
            own = in_order(own)
            splits[split] = tuple(entry.item for entry in own)
            _refuse_twins(contents.where, splits[split])
        if not entries.get("val") and val_fraction > 0:
            splits = _split_by_key(splits["train"], val_fraction)
        if not splits["train"]:
            raise ImageError(
                f"{contents.where}: val_fraction {val_fraction} leaves none of {self.fingerprint.images} images to "
                "train on. Lower it."
            )
        self.splits = {split: splits[split] for split in SPLITS}

    @property
    def items(self) -> tuple[Item, ...]:
        """The training images."""
        return self.splits["train"]

    def read_rgb(self, path: str | Path) -> Image.Image:
        """The picture of an item, mode RGB. Raises ImageError."""
        return self.reader(path)


class ImageFolder(Listing):
    """Class sub-folders of images: `root/<class>/**/<image>`, or the same inside `root/train` and `root/val`.

    Classes are the sub-folders' names, sorted. Links are followed; what is no picture is left out and noted (`walk`).
    `splits` has the names of splits. As ImageNet is distributed, `root/val` may hold its images in no class folders:
    then `val_labels`, or a file that VAL_LABELS names, gives their classes (see `flat_labels`), and the listing is the
    same as if they lay in class folders. Raises ImageError when the folder does not exist, can be read in two ways,
    holds no class, a class holds no image, a validation image has no label, or nothing is left to train on.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        val_fraction: float = 0.0,
        rules: Rules = AS_PUBLISHED,
        val_labels: Path | None = None,
    ) -> None:
        self.root = Path(root)
        super().__init__(look_into(self.root, val_labels), FileReader(**vars(rules)), val_fraction)


def look_into(root: Path, val_labels: Path | None = None) -> Contents:
    """The images of a folder; see ImageFolder."""
    walk = Walk(root)
    folders = split_folders(walk)
    names = tuple(name for name, _ in _class_folders(walk, folders["train"]))
    entries = {}
    for split, folder in folders.items():
        labels_file = val_labels or _find_labels(folder)
        flat = split == "val" and _is_flat(walk, folder, names, labels_file)
        listed = _list_flat(walk, folder, names, labels_file) if flat else _list_split(walk, folder, names)
        entries[split] = list(listed)
    classes = tuple(map(printable, names))
    notes = (*misleading_numbers(classes), *walk.notes())
    return Contents("image_folder", f"image folder {root}", classes, entries, notes, walk.evidence)


def misleading_numbers(classes: tuple[str, ...]) -> list[str]:
    """A note where the order of names as text, which numbers the classes, is not the one that people count in."""
    counted = {name: place for place, name in enumerate(sorted(classes, key=_counting))}
    expected = [int(name) if name.isdecimal() else counted[name] for name in classes]
    for label, (name, other) in enumerate(zip(classes, expected, strict=True)):
        if label != other:
            return [
                f"classes are numbered from 0 in the order of their names as text: {name!r} is class number {label}, "
                f"not {other}. Say classes by their names, or give numbers equally many digits (00, 01, ...)"
            ]
    return []


def _counting(name: str) -> list[tuple[int, str]]:
    """A key that sorts runs of digits by their value."""
    return [(int(run), "") if run.isdecimal() else (-1, run) for run in re.split(r"(\d+)", name)]


def say_notes(source: Source) -> None:
    """Tell what a user should know of a listing."""
    for note in source.notes:
        log.warning("%s.", note)


def held_out(key: str, fraction: float) -> bool:
    """Whether an image belongs to a validation split of that size: a hash of its key, the same everywhere."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"mvar-val").digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def tar_key(relative: str) -> str:
    """A relative path as a sample's key: letters, digits, `_`, `-`, `/` stay, the rest is percent-encoded.

    Readers of webdataset tars cut a member's name at its first dot and skip names like `__x__`; keys have neither.
    Long paths keep their beginning and end in a hash, so that every member's name fits into a plain tar header.
    """
    safe = re.compile(r"[A-Za-z0-9_/-]")
    quoted = "".join(chr(b) if safe.match(chr(b)) else f"%{b:02X}" for b in os.fsencode(relative))
    key = re.sub(r"(^|/)__", r"\1%5F_", quoted)
    if len(key) <= MAX_KEY:
        return key
    return f"{key[: MAX_KEY - 17]}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def _split_by_key(items: tuple[Item, ...], fraction: float) -> dict[str, tuple[Item, ...]]:
    return {
        "train": tuple(item for item in items if not held_out(item.key, fraction)),
        "val": tuple(item for item in items if held_out(item.key, fraction)),
    }


def _class_folders(walk: Walk, folder: Path) -> list[tuple[str, Path]]:
    found = walk.folders(folder)
    if not found:
        loose = sum(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in walk.entries(folder))
        raise ImageError(
            f"image folder {folder}: no class sub-folders ({loose} images lie directly in it). "
            "Put the images of each class into a sub-folder named after the class."
        )
    return found


def _list_split(walk: Walk, folder: Path, classes: tuple[str, ...]) -> Iterator[Entry]:
    labels = {name: label for label, name in enumerate(classes)}
    for name, class_folder in _class_folders(walk, folder):
        if name not in labels:
            raise ImageError(
                f"image folder {folder}: class {printable(name)!r} has no folder among the training images. "
                "Validation classes must be a part of the training classes."
            )
        listed = list(walk.images(class_folder))
        if not listed:
            raise ImageError(
                f"image folder {class_folder}: no images that Pillow opens. Remove the empty class folder, or put "
                "images into it."
            )
        yield from _entries(name, labels[name], listed)


def _find_labels(folder: Path) -> Path | None:
    found = [place / name for place in (folder.parent, folder) for name in VAL_LABELS]
    return next((path for path in found if path.is_file()), None)


def _is_flat(walk: Walk, folder: Path, classes: tuple[str, ...], labels_file: Path | None) -> bool:
    """Whether the images of `folder` lie in no class folders: loose, or there is a file of their labels."""
    folders = {name for name, _ in walk.folders(folder)}
    return folders.isdisjoint(classes) and (labels_file is not None or not folders)


def _list_flat(walk: Walk, folder: Path, classes: tuple[str, ...], labels_file: Path | None) -> Iterator[Entry]:
    if labels_file is None:
        raise ImageError(
            f"image folder {folder}: its images lie in no class folders, and there is no file of their labels "
            f"(looked for {', '.join(VAL_LABELS)} beside it and in it). Give val_labels=FILE with a line `file class` "
            "for each, such as ImageNet's LOC_val_solution.csv."
        )
    labels = flat_labels(labels_file, classes)
    walk.look_at(labels_file)
    by_label: dict[int, list[Found]] = {}
    for inside, path, size in walk.images(folder):
        name = os.path.basename(inside)
        label = labels.get(name, labels.get(os.path.splitext(name)[0]))
        if label is None:
            raise ImageError(f"image {path}: {labels_file} has no line for it. Add one, or remove the image.")
        by_label.setdefault(label, []).append(Found(name, path, size))
    for label, listed in by_label.items():
        yield from _entries(classes[label], label, listed)


def flat_labels(path: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Labels by file name: lines `file class ...`, separated by a comma or blanks, with or without extension.

    A class is a name or its number in the sorted names, from 0 (but not where names are numbers themselves); what
    follows it does not matter, nor does a header. Raises ImageError.
    """
    names = {name: label for label, name in enumerate(classes)}
    numbers = {} if any(map(str.isdecimal, classes)) else {str(label): label for label in range(len(classes))}
    labels = {}
    for number, line in enumerate(text_lines(path, names=True)):
        file, *rest = re.split(r"[,\s]+", line.strip(), maxsplit=2)
        if not rest:
            raise ImageError(
                f"{path}, line {number + 1}: expected a file and its class, got {line[:60]!r}. (The numbers of "
                "ImageNet's development kit do not follow the sorted synsets; use LOC_val_solution.csv.)"
            )
        label = names.get(rest[0], numbers.get(rest[0]))
        if label is not None:
            labels[file] = label
        elif number:  # The first line may be a header.
            raise ImageError(f"{path}, line {number + 1}: {rest[0]!r} is no class of the training images.")
    return labels


def text_lines(path: Path, *, names: bool = False) -> list[str]:
    """The lines of a UTF-8 file that are not blank. Raises ImageError.

    `names`: it holds names of files, so other bytes are kept as Python keeps them in names of files.
    """
    errors = "surrogateescape" if names else "strict"
    try:
        lines = path.read_text(encoding="utf-8-sig", errors=errors).split("\n")
        return [line for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{path}: cannot be read ({error}). Give a text file.") from None


def _entries(name: str, label: int, listed: list[Found]) -> Iterator[Entry]:
    keys = file_keys([f"{name}/{inside}" for inside, _, _ in listed])
    for key, (_, path, size) in zip(keys, listed, strict=True):
        yield Entry(Item(key, path, label, size), size)


def file_keys(names: list[str]) -> list[str]:
    """A key for each relative path: without its extension, or with it where two differ in nothing else."""
    stems = [os.path.splitext(name)[0] for name in names]
    count = Counter(stems)
    return [tar_key(stem if count[stem] == 1 else name) for name, stem in zip(names, stems, strict=True)]


def _refuse_twins(where: str, items: tuple[Item, ...]) -> None:
    for key, count in Counter(item.key for item in items).items():
        if count > 1:
            raise ImageError(f"{where}: two images share the key {key!r}. Rename one of them.")
