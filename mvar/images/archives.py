"""webdataset tars of images and classes as a source: local files, or any URL that `gopen` opens."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mvar.errors import ImageError
from mvar.files.remote import fetch
from mvar.images.listfile import numbered_classes, untrained
from mvar.images.pixels import LARGEST_BYTES, Rules, decode, too_large
from mvar.images.sources import SPLITS, Contents, Entry, Item, tar_key
from mvar.images.splits import role_in
from mvar.images.walk import IMAGE_SUFFIXES, Evidence, Omissions, evidence_of, is_litter
from mvar.paths import is_url

LABEL_SUFFIX = ".cls"


@dataclass(frozen=True)
class MemberReader(Rules):
    """Reads images out of tars; a location is `TAR@OFFSET+BYTES`."""

    def __call__(self, path: str | Path, size_bytes: int | None = None) -> Image.Image:
        tar, _, place = str(path).rpartition("@")
        offset, _, size = place.partition("+")
        if int(size) > LARGEST_BYTES:
            raise too_large(str(path), f"{int(size):,} bytes, more than {LARGEST_BYTES:,}")
        try:
            with open(tar, "rb") as file:
                file.seek(int(offset))
                data = file.read(int(size))
        except OSError as error:
            raise ImageError(f"image {path}: cannot be read ({error.strerror}). Mend {tar} and run again.") from None
        if len(data) < int(size):
            raise ImageError(f"image {path}: the tar ends before it. It changed since it was listed; run again.")
        return decode(data, str(path), self)


class _Member(NamedTuple):
    offset: int
    bytes: int


def look_into(pattern: str, cache: Path | None = None, class_names: tuple[str, ...] | None = None) -> Contents:
    """Samples `<key>.<image suffix>` and `<key>.cls` (ASCII class index) of the tars of a folder or a brace pattern.

    Tars with `val`, `valid` or `validation` as a word of their name are the split `val`; those with `test` or `testing`
    are left out, unless there are no others. Pictures are read where they lie, in any order, so tars behind a URL are
    first copied into `cache`, each once. Classes are numbers unless `class_names` names them. Raises ImageError,
    StoreError (a URL cannot be fetched).
    """
    where, left_out = f"tars {pattern}", Omissions()
    entries: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    evidence: Evidence = {}
    urls = expand(pattern)
    if os.path.isdir(pattern):
        evidence[pattern] = evidence_of(pattern)
    if {role_in(_stem(url)) for url in urls} != {"test"}:
        for url in urls:
            if role_in(_stem(url)) == "test":
                left_out.add("a tar for tests", url)
        urls = [url for url in urls if role_in(_stem(url)) != "test"]
    for stem, path in _local_tars(urls, cache):
        split = "val" if role_in(stem) == "val" else "train"
        entries[split] += _list_tar(stem, path, left_out)
        evidence[str(path)] = evidence_of(path)
    labels = [entry.item.label for own in entries.values() for entry in own]
    if not labels:
        raise ImageError(f"{where}: no samples. Expected members <key>.jpg (or another image) and <key>.cls.")
    trained = Counter(entry.item.label for entry in entries["train"])
    classes = numbered_classes(trained, max(labels) + 1, class_names, where)
    notes = (*untrained(classes, entries["train"]), *left_out.notes())
    return Contents("tars", where, classes, entries, notes, evidence)


def expand(pattern: str) -> list[str]:
    """Paths or URLs of a brace pattern (`train-{000..146}.tar`), or the tars of a folder. Raises ImageError."""
    if os.path.isdir(pattern):
        return sorted(str(path) for path in Path(pattern).glob("*.tar") if not is_litter(path.name))
    import braceexpand

    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError:
        raise ImageError(f"tars {pattern}: its braces do not pair up.") from None


def _local_tars(urls: list[str], cache: Path | None) -> list[tuple[str, Path]]:
    """(name without .tar, local path) of each tar, fetched where it is remote."""
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
    return cache / f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:16]}-{_stem(url)}.tar"


def _stem(url: str) -> str:
    names = re.findall(r"([^/\s'\"]+)\.tar\b", url)
    return names[-1] if names else hashlib.sha256(os.fsencode(url)).hexdigest()[:16]


def _list_tar(stem: str, path: Path, left_out: Omissions) -> Iterator[Entry]:
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        total = path.stat().st_size
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # It would keep every header.
                folder, _, name = info.name.rpartition("/")
                if not info.isfile() or any(is_litter(part) for part in info.name.split("/") if part != "."):
                    continue
                key, _, suffix = name.partition(".")
                key = f"{folder}/{key}" if folder else key
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError("it ends in the middle of a member")
                if f".{suffix}" == LABEL_SUFFIX:
                    file.seek(info.offset_data)
                    labels[key] = _label(path, info.name, file.read(info.size))
                elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                    if key in images:
                        raise ImageError(f"tar {path}: sample {key} has two images. Keep one.")
                    images[key] = _Member(info.offset_data, info.size)
                else:
                    left_out.add(f"no picture by its name (.{suffix})", f"{path}: {info.name}")
            file.seek(max(total - tarfile.BLOCKSIZE, 0))
            if any(file.read()):
                raise tarfile.ReadError("it has no end mark")
    except (OSError, tarfile.TarError) as error:
        raise ImageError(
            f"tar {path}: cannot be read ({error}). Expected an uncompressed tar; copy it again from its source."
        ) from None
    for key in labels.keys() - images.keys():
        left_out.add(f"a sample with a {LABEL_SUFFIX} and no picture", f"{path}: {key}")
    for key, member in images.items():
        if key not in labels:
            raise ImageError(f"tar {path}: sample {key} has no {LABEL_SUFFIX}. Add one, or remove the sample.")
        location = f"{path}@{member.offset}+{member.bytes}"
        yield Entry(Item(tar_key(f"{stem}/{key}"), location, labels[key], member.bytes), member.bytes)


def _label(path: Path, name: str, data: bytes) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", data):
        raise ImageError(f"tar {path}: {name} holds {data[:20]!r}, expected a class index. Mend the tar.")
    return int(data)
