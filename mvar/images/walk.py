"""What lies in a folder of images: the pictures, by name or content, and a count of everything that is left out."""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mvar.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".gif"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".mpo"),
        *(".tga", ".ico", ".pcx", ".psd", ".qoi", ".sgi", ".dds"),
    }
)
"""Files with these are pictures, without a look into them."""
SIGNED = ("AVIF", "BMP", "DDS", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP")
"""Formats that are known by their first bytes, whatever the file is called."""
LITTER = frozenset(
    {
        *("@eadir", "@recycle", "@recently-snapshot", "@snapshot", "@__thumb", "#recycle", "#snapshot", "~snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found", "__macosx", "__pycache__"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini"),
    }
)
"""Lower-case names of what file servers and systems put beside users' files, thumbnails among them."""
Evidence = dict[str, tuple[int, int]]
"""Of each file or folder that a listing looked into: size in bytes (0 for folders), and when it changed, in ns."""


class Found(NamedTuple):
    """A picture: its path inside a class folder, its full path, its size in bytes."""

    inside: str
    path: str
    bytes: int


class Omissions:
    """Counts what a listing leaves out, by reason, and keeps the first of each as an example."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, name: str) -> None:
        count, example = self._found.get(reason, (0, name))
        self._found[reason] = count + 1, example

    def notes(self) -> tuple[str, ...]:
        """One line for each reason."""
        return tuple(
            f"left out, {reason}: {count:,}, such as {printable(example)}"
            for reason, (count, example) in sorted(self._found.items())
        )


class Walk:
    """Looks through the folders under `root`, and notes what it left out and when each folder last changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = Omissions()
        self.remarks: list[str] = []
        self.evidence: Evidence = {}
        self._entries: dict[Path, list[os.DirEntry[str]]] = {}

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What lies in a folder, by name, without hidden things and litter. Raises ImageError."""
        if folder in self._entries:
            return self._entries[folder]
        kept = []
        try:
            self.evidence[str(folder)] = 0, os.stat(folder).st_mtime_ns  # First: a change from now on is another time.
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if is_litter(entry.name):
                        self.left_out.add("hidden, or of the system", self.name(entry.path))
                    else:
                        kept.append(entry)
        except OSError as error:
            raise ImageError(
                f"image folder {folder}: cannot be listed ({error.strerror}). "
                "Expected a folder with one sub-folder of images for each class."
            ) from None
        return kept

    def folders(self, folder: Path) -> list[tuple[str, Path]]:
        """Name and path of each sub-folder, also behind links. They stay in mind, for another look."""
        self._entries[folder] = self.entries(folder)
        return [(entry.name, Path(entry.path)) for entry in self._entries[folder] if _is_folder(entry)]

    def images(self, folder: Path) -> Iterator[Found]:
        """The pictures in a folder and in all below it, in no particular order. Raises ImageError.

        Links are followed. A folder is looked into once, under its own name if it has one here, so that circles end;
        and never if it lies above.
        """
        seen = {_identity(above) for above in (folder.parent, self.root)}
        own, linked = [(folder, "")], list[tuple[Path, str]]()
        while own or linked:
            current, inside = own.pop() if own else linked.pop(0)
            if _identity(current) in seen:
                self.left_out.add("a link to a folder that is listed already", self.name(current))
                continue
            seen.add(_identity(current))
            for entry in self.entries(current):
                if _is_folder(entry):
                    (linked if entry.is_symlink() else own).append((Path(entry.path), f"{inside}{entry.name}/"))
                elif self._is_image(entry):
                    yield Found(f"{inside}{entry.name}", entry.path, _size(entry))

    def holds_image(self, folder: Path) -> bool:
        """Whether there is a picture in the folder or below it."""
        return next(self.images(folder), None) is not None

    def leave_out_files(self, folder: Path) -> None:
        """Note the files directly in a folder, which belong to no class."""
        for entry in self.entries(folder):
            if not _is_folder(entry) and self._is_image(entry):
                self.left_out.add("pictures in no class folder", self.name(entry.path))

    def look_at(self, file: Path) -> None:
        """Note that the listing depends on a file."""
        self.evidence[str(file)] = evidence_of(file)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the listing."""
        return (*self.remarks, *self.left_out.notes())

    def name(self, path: str | Path) -> str:
        """A path as seen from the root, for people."""
        return os.path.relpath(path, self.root)

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        suffix = os.path.splitext(entry.name)[1].lower()
        try:
            if entry.is_file():
                if suffix in IMAGE_SUFFIXES or holds_picture(entry.path):
                    return True
                reason = f"no picture that Pillow opens ({suffix or 'no extension'})"
            elif entry.is_symlink():
                if suffix in IMAGE_SUFFIXES:
                    return True  # A picture that is missing: reading its size says so.
                reason = "a link to nothing"
            else:
                reason = "neither a file nor a folder"
        except PermissionError:
            reason = "not readable"
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise _unreadable(entry.path, error) from None
            reason = "a link to nothing"
        self.left_out.add(reason, self.name(entry.path))
        return False


def is_litter(name: str) -> bool:
    """Whether a name is hidden, or one that file servers and systems use."""
    return name.startswith(".") or name.lower() in LITTER


def holds_picture(path: str) -> bool:
    """Whether a file's first bytes are those of a picture. Raises OSError: it cannot be read."""
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except OSError as error:
        if error.errno is not None:
            raise
        return False
    except Exception:  # Pillow raises almost anything on what is no picture.
        return False


def evidence_of(path: str | Path) -> tuple[int, int]:
    """What `Evidence` keeps of a file or folder. Raises OSError."""
    found = os.stat(path)
    return (0 if stat.S_ISDIR(found.st_mode) else found.st_size), found.st_mtime_ns


def printable(name: str) -> str:
    """A name as text that can be printed and encoded: bytes of file names that are no UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in SIGNED if name in Image.OPEN)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # A link to itself.
            return False
        raise _unreadable(entry.path, error) from None


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise _unreadable(str(folder), error) from None
    return found.st_dev, found.st_ino


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        raise _unreadable(entry.path, error) from None


def _unreadable(path: str, error: OSError) -> ImageError:
    return ImageError(f"image {path}: cannot be read ({error.strerror}). Replace or remove it.")
