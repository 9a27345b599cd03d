"""Where images come from: a listing of labelled images, and a reader that turns one of them into RGB pixels.

A source lists once and reads many times. Everything that works on images (tokenizing, tokenizer training, evaluation)
sees only `Source`: add a layout (list file, archives, ...) by writing another class with the same attributes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image

from mvar.errors import ImageError

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"},
)
MAX_KEY = 88
"""Characters of a key, at most."""
Background = Literal["white", "black", "drop"]
"""What shows through transparent pixels: white, black, or whatever colour is stored under them."""


class Item(NamedTuple):
    """One labelled image. `key` is unique in its split and safe inside a tar; `path` means something to the reader."""

    key: str
    path: str
    label: int


class Fingerprint(NamedTuple):
    """What a listing held, cheaply: changes when a file is added, removed, renamed, or changes its size."""

    kind: str
    images: int
    bytes: int
    sha256: str


class Reader(Protocol):
    """Turns a location (an item's `path`) into a picture. Small enough to be sent to worker processes."""

    def __call__(self, path: str | Path) -> Image.Image:
        """Mode RGB, stored orientation. Raises ImageError."""


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


@dataclass(frozen=True)
class FileReader:
    """Decodes image files with Pillow.

    The name's extension does not matter (ImageNet has a PNG named .JPEG), CMYK and greyscale become RGB, 16-bit
    greyscale keeps its top 8 bits, EXIF orientation is not applied (as in the published pipeline). A picture with
    transparency is laid on `background`.
    """

    background: Background = "white"

    def __call__(self, path: str | Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()
                return to_rgb(image, self.background)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
            reason = f"{type(error).__name__}: {error}".replace(f"'{path}'", "the file").replace(str(path), "the file")
            raise ImageError(
                f"image {path}: cannot be decoded ({reason}). Replace or remove the file, then run the command again."
            ) from None


def to_rgb(image: Image.Image, background: Background = "white") -> Image.Image:
    """`image` in mode RGB; transparency is laid on `background`."""
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would saturate to white.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent and background != "drop":
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    if transparent:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_rgb(path: str | Path, background: Background = "white") -> Image.Image:
    """The picture in `path`, mode RGB (see FileReader). Raises ImageError."""
    return FileReader(background)(path)


class ImageFolder:
    """Class sub-folders of images: `root/<class>/**/<image>`, or the same inside `root/train` and `root/val`.

    Classes are the sub-folders' names, sorted; items are sorted by (label, key). Hidden files and files without an
    image's extension are ignored. Without `root/val`, `val_fraction` of the images, picked by a hash of their keys
    (so that adding images moves no other), becomes the split `val`. Raises ImageError when the folder does not exist,
    holds no class, a class holds no image, or nothing is left to train on.
    """

    def __init__(self, root: str | Path, *, val_fraction: float = 0.0, background: Background = "white") -> None:
        self.root = Path(root)
        self.reader = FileReader(background)
        folders = _split_folders(self.root)
        self.classes = tuple(name for name, _ in _class_folders(folders["train"]))
        digest, images, size = hashlib.sha256(), 0, 0
        splits: dict[str, tuple[Item, ...]] = {"val": ()}
        for split, folder in folders.items():
            items, sizes = _list_split(folder, self.classes)
            splits[split] = tuple(items)
            images, size = images + len(items), size + sum(sizes)
            digest.update(f"{split}\n".encode())
            digest.update("".join(f"{i.key}\t{i.label}\t{s}\n" for i, s in zip(items, sizes, strict=True)).encode())
        digest.update("\n".join(self.classes).encode())
        if "val" not in folders and val_fraction > 0:
            splits = _split_by_key(splits["train"], val_fraction)
        if not splits["train"]:
            raise ImageError(
                f"image folder {self.root}: val_fraction {val_fraction} leaves none of {images} images to train on. "
                "Lower it."
            )
        self.splits = {split: splits[split] for split in SPLITS}
        self.fingerprint = Fingerprint("image_folder", images, size, digest.hexdigest())

    @property
    def items(self) -> tuple[Item, ...]:
        """The training images."""
        return self.splits["train"]

    def read_rgb(self, path: str | Path) -> Image.Image:
        """The picture of an item, mode RGB. Raises ImageError."""
        return self.reader(path)


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


def _split_folders(root: Path) -> dict[str, Path]:
    """`train` (and `val`) sub-folders if the folder is laid out so, else the folder itself as `train`."""
    names = {entry.name for entry in _visible(root) if entry.is_dir()}
    if "train" in names and names <= {"train", "val", "test"} and any(e.is_dir() for e in _visible(root / "train")):
        return {split: root / split for split in SPLITS if split in names}
    return {"train": root}


def _visible(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(
            f"image folder {folder}: cannot be listed ({error.strerror}). "
            "Expected a folder with one sub-folder of images for each class."
        ) from None


def _class_folders(folder: Path) -> list[tuple[str, Path]]:
    found = [(entry.name, Path(entry.path)) for entry in _visible(folder) if entry.is_dir()]
    if not found:
        loose = sum(Path(entry.name).suffix.lower() in IMAGE_SUFFIXES for entry in _visible(folder))
        raise ImageError(
            f"image folder {folder}: no class sub-folders ({loose} images lie directly in it). "
            "Put the images of each class into a sub-folder named after the class."
        )
    return found


def _list_split(folder: Path, classes: tuple[str, ...]) -> tuple[list[Item], list[int]]:
    """Items sorted by (label, key), and their sizes in bytes."""
    labels = {name: label for label, name in enumerate(classes)}
    items, sizes = [], []
    for name, class_folder in _class_folders(folder):
        if name not in labels:
            raise ImageError(
                f"image folder {folder}: class {name!r} has no folder among the training images. "
                "Validation classes must be a part of the training classes."
            )
        listed = sorted(_list_class(class_folder))
        if not listed:
            raise ImageError(
                f"image folder {class_folder}: no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}). "
                "Remove the empty class folder, or put images into it."
            )
        for relative, path, size in _with_keys(name, listed, class_folder):
            items.append(Item(relative, path, labels[name]))
            sizes.append(size)
    return items, sizes


def _list_class(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(path inside the class folder, full path, bytes) of each image, in no particular order."""
    waiting = [(str(folder), "")]
    while waiting:
        current, inside = waiting.pop()
        for entry in _visible(Path(current)):
            if entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, f"{inside}{entry.name}/"))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.is_dir():
                try:
                    size = entry.stat().st_size
                except OSError as error:
                    raise ImageError(
                        f"image {entry.path}: cannot be read ({error.strerror}). Replace or remove it."
                    ) from None
                yield f"{inside}{entry.name}", entry.path, size


def _with_keys(name: str, listed: list[tuple[str, str, int]], folder: Path) -> list[tuple[str, str, int]]:
    """Keys for one class: the name without its extension, or with it where two files differ in nothing else."""
    stems = Counter(os.path.splitext(inside)[0] for inside, _, _ in listed)
    keyed = []
    for inside, path, size in listed:
        stem = os.path.splitext(inside)[0]
        keyed.append((tar_key(f"{name}/{stem if stems[stem] == 1 else inside}"), path, size))
    keyed.sort()
    twice = [key for key, count in Counter(key for key, _, _ in keyed).items() if count > 1]
    if twice:
        raise ImageError(f"image folder {folder}: two images share the key {twice[0]!r}. Rename one of them.")
    return keyed
