"""webdataset tars of images and classes as a source: local files, or any URL that `gopen` opens."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mvar.errors import ImageError
from mvar.files.remote import fetch, is_url
from mvar.images.listfile import numbered_classes
from mvar.images.pixels import Background, decode
from mvar.images.sources import IMAGE_SUFFIXES, SPLITS, Entry, Item, Listing, tar_key

LABEL_SUFFIX = ".cls"


@dataclass(frozen=True)
class MemberReader:
    """Reads images out of tars; a location is `TAR@OFFSET+BYTES`."""

    background: Background = "white"

    def __call__(self, path: str | Path) -> Image.Image:
        tar, _, place = str(path).rpartition("@")
        offset, _, size = place.partition("+")
        try:
            with open(tar, "rb") as file:
                file.seek(int(offset))
                data = file.read(int(size))
        except OSError as error:
            raise ImageError(f"image {path}: cannot be read ({error.strerror}). Mend {tar} and run again.") from None
        return decode(data, str(path), self.background)


class _Member(NamedTuple):
    offset: int
    bytes: int


class Archives(Listing):
    """Samples `<key>.<image suffix>` and `<key>.cls` (ASCII class index) of the tars of a folder or a brace pattern.

    Tars with `val`, `valid` or `validation` as a word of their name are the split `val`. Pictures are read where they
    lie, in any order, so tars behind a URL are first copied into `cache`, each once. Classes are numbers unless
    `class_names` names them. Raises ImageError, StoreError (a URL cannot be fetched).
    """

    def __init__(
        self,
        pattern: str,
        *,
        cache: Path | None = None,
        val_fraction: float = 0.0,
        background: Background = "white",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        where = f"tars {pattern}"
        entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
        for stem, path in _local_tars(pattern, cache):
            split = "val" if re.search(r"(^|[-_.])(val|valid|validation)([-_.]|\d|$)", stem) else "train"
            entries[split] += _list_tar(stem, path)
        labels = [entry.item.label for own in entries.values() for entry in own]
        if not labels:
            raise ImageError(f"{where}: no samples. Expected members <key>.jpg (or another image) and <key>.cls.")
        classes = numbered_classes(max(labels) + 1, class_names, where)
        super().__init__("tars", where, classes, entries, MemberReader(background), val_fraction)


def expand(pattern: str) -> list[str]:
    """Paths or URLs of a brace pattern (`train-{000..146}.tar`), or the tars of a folder. Raises ImageError."""
    if os.path.isdir(pattern):
        return sorted(str(path) for path in Path(pattern).glob("*.tar"))
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise ImageError(f"tars {pattern}: its braces do not pair up.") from None


def _local_tars(pattern: str, cache: Path | None) -> list[tuple[str, Path]]:
    """(name without .tar, local path) of each tar, fetched where it is remote."""
    urls = expand(pattern)
    places = [(_stem(url), _place(url, cache)) for url in urls]
    # Tasks that share a cache begin at different places, so that each fetches a part and finds the rest.
    turn = os.getpid() % max(len(urls), 1)
    for url, (_, path) in [*zip(urls, places, strict=True)][turn:] + [*zip(urls, places, strict=True)][:turn]:
        if is_url(url) and not path.exists():
            fetch(url, path)
    return places


def _place(url: str, cache: Path | None) -> Path:
    if not is_url(url):
        return Path(url)
    if cache is None:
        raise ImageError(
            f"tar {url}: tars behind a URL are copied before they are read. Give source_cache=FOLDER with room for "
            "all of them, which all tasks may share."
        )
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{_stem(url)}.tar"


def _stem(url: str) -> str:
    names = re.findall(r"([^/\s'\"]+)\.tar\b", url)
    return names[-1] if names else hashlib.sha256(url.encode()).hexdigest()[:16]


def _list_tar(stem: str, path: Path) -> Iterator[Entry]:
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        total = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # It would keep every header.
                folder, _, name = info.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key = f"{folder}/{key}" if folder else key
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError("it ends in the middle of a member")
                if f".{suffix}" == LABEL_SUFFIX:
                    file.seek(info.offset_data)
                    labels[key] = _label(path, info.name, file.read(info.size))
                elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and info.isfile():
                    if key in images:
                        raise ImageError(f"tar {path}: sample {key} has two images. Keep one.")
                    images[key] = _Member(info.offset_data, info.size)
            file.seek(max(total - tarfile.BLOCKSIZE, 0))
            if any(file.read()):
                raise tarfile.ReadError("it has no end mark")
    except (OSError, tarfile.TarError) as error:
        raise ImageError(
            f"tar {path}: cannot be read ({error}). Expected an uncompressed tar; copy it again from its source."
        ) from None
    for key, member in images.items():
        if key not in labels:
            raise ImageError(f"tar {path}: sample {key} has no {LABEL_SUFFIX}. Add one, or remove the sample.")
        location = f"{path}@{member.offset}+{member.bytes}"
        yield Entry(Item(tar_key(f"{stem}/{key}"), location, labels[key]), member.bytes)


def _label(path: Path, name: str, data: bytes) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", data):
        raise ImageError(f"tar {path}: {name} holds {data[:20]!r}, expected a class index. Mend the tar.")
    return int(data)
