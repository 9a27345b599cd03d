"""Picks the kind of source that a path or URL is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mvar.errors import ConfigError
from mvar.files.remote import is_url
from mvar.images.archives import Archives
from mvar.images.listfile import ListFile
from mvar.images.pixels import AS_PUBLISHED, Rules
from mvar.images.sources import ImageFolder, Source, text_lines
from mvar.images.walk import is_litter

Kind = Literal["auto", "folder", "list", "tars"]
LIST_SUFFIXES = frozenset({".csv", ".txt", ".lst"})


def open_images(
    source: str,
    kind: Kind = "auto",
    *,
    val_fraction: float = 0.0,
    rules: Rules = AS_PUBLISHED,
    val_labels: Path | None = None,
    class_names: Path | None = None,
    cache: Path | None = None,
) -> Source:
    """List the images of `source`; options that its kind has no use for are refused. Raises MvarError."""
    kind = detect(source) if kind == "auto" else kind
    useless = {"val_labels": kind != "folder" and val_labels, "class_names": kind == "folder" and class_names}
    for option, given in useless.items():
        if given:
            raise ConfigError(f"{option}: has no meaning for source {source} of kind {kind}. Leave it out.")
    names = None if class_names is None else tuple(line.strip() for line in text_lines(class_names))
    if kind == "list":
        return ListFile(source, val_fraction=val_fraction, rules=rules, class_names=names)
    if kind == "tars":
        return Archives(source, cache=cache, val_fraction=val_fraction, rules=rules, class_names=names)
    return ImageFolder(source, val_fraction=val_fraction, rules=rules, val_labels=val_labels)


def detect(source: str) -> Kind:
    """A URL, a name ending in .tar, or a folder of tars alone is tars; a .csv, .txt or .lst a list; else a folder."""
    path = Path(source)
    if path.is_dir():
        seen = [entry for entry in path.iterdir() if not is_litter(entry.name)]
        only_tars = any(entry.suffix == ".tar" for entry in seen) and not any(entry.is_dir() for entry in seen)
        return "tars" if only_tars else "folder"
    if is_url(source) or path.suffix == ".tar":
        return "tars"
    return "list" if path.suffix in LIST_SUFFIXES else "folder"
