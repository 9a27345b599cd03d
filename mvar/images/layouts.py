"""Picks the kind of source that a path or URL is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mvar.errors import ConfigError
from mvar.images import archives, listfile
from mvar.images.pixels import AS_PUBLISHED, FileReader, Rules
from mvar.images.sources import Contents, Listing, Source, look_into, text_lines
from mvar.images.walk import is_litter
from mvar.paths import is_url

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
    kept: Callable[[dict[str, Any], Callable[[], Contents]], Contents] | None = None,
) -> Source:
    """List the images of `source`; options that its kind has no use for are refused. Raises MvarError.

    `kept`: gives the contents of what is asked for, as plain data, without the look that is its second argument, if it
    can.
    """
    kind = detect(source) if kind == "auto" else kind
    useless = {"val_labels": kind != "folder" and val_labels, "class_names": kind == "folder" and class_names}
    for option, given in useless.items():
        if given:
            raise ConfigError(f"{option}: has no meaning for source {source} of kind {kind}. Leave it out.")
    names = None if class_names is None else tuple(line.strip() for line in text_lines(class_names))

    def look() -> Contents:
        if kind == "list":
            return listfile.look_into(Path(source), names)
        if kind == "tars":
            return archives.look_into(source, cache, names)
        return look_into(Path(source), val_labels)

    asked = {
        "source": source,
        "place": None if is_url(source) else os.path.abspath(source),
        "kind": kind,
        "val_labels": None if val_labels is None else os.path.abspath(val_labels),
        "class_names": None if names is None else list(names),
        "cache": None if cache is None else os.path.abspath(cache),
    }
    reader = archives.MemberReader if kind == "tars" else FileReader
    return Listing(look() if kept is None else kept(asked, look), reader(**vars(rules)), val_fraction)


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
