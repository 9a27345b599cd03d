"""The real images of a comparison, read as a store's images were: its split, its resize, its colours, its damage.

Without a store the same choices are options, as `mvar tokenize` has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from mvar.data.manifest import Manifest
from mvar.errors import ConfigError, ImageError, StoreError
from mvar.evaluation.fidelity import mixed
from mvar.evaluation.pictures import CentreView, ListedPictures, SkipBad
from mvar.images.layouts import Kind, open_images
from mvar.images.pixels import Background, Orientation, Rules
from mvar.images.sources import Item, Source, say_notes
from mvar.images.views import RESIZE

SPLITS = ("train", "val")
TOLD_BY_STORE = ("val_fraction", "resize", "background", "orientation", "grey_bits", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where real images come from, and how they are read."""
    add = parser.add_argument_group("real images").add_argument
    add("--images", help="the source that was tokenized: class folders, list file or tars")
    add(
        "--store", type=Path, help="code store made of them: gives split, resize, size, background, held-out share, ..."
    )
    add("--split", choices=SPLITS, help="which images to compare with; default: train, as papers do")
    add("--source-kind", choices=get_args(Kind), default="auto", help="what --images is (default: seen from its name)")
    add("--source-cache", type=Path, help="folder with copies of tars behind a URL")
    add("--val-labels", type=Path, help="labels of a val/ without class folders")
    add("--class-names", type=Path, help="a class name a line, where the source has numbers")
    add("--val-fraction", type=float, help="share held out, where the source has no val/ (default 0; not with --store)")
    add("--resize", type=float, help=f"shorter side before the crop, in sizes (default {RESIZE}; not with --store)")
    add("--size", type=int, help="side in pixels (default: the samples', or the store's)")
    add("--background", choices=get_args(Background), help="under transparency (default white; not with --store)")
    add("--orientation", choices=get_args(Orientation), help="exif: turn as EXIF data say (default stored)")
    add("--grey-bits", type=int, help="bits of deep greyscale (not with --store)")
    add("--skip-bad", type=int, default=0, metavar="N", help="leave out up to N damaged pictures")


@dataclass(frozen=True)
class RealImages:
    """A source of real images and how they are cut."""

    source: Source
    size: int
    resize: float
    rules: Rules
    val_fraction: float
    left_out: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Keys that the store left out as damaged, by split: two splits may have an image of one key."""
    store: Path | None = None

    @classmethod
    def of(cls, args: argparse.Namespace, size: int | None, *, val_fraction: float = 0.0) -> RealImages:
        """As the command line says; `size`: where neither it nor a store says one. Raises MvarError."""
        if args.images is None:
            raise ConfigError("--images: give the source of the real images (with --store: the one it was made of).")
        if args.store is None:
            return cls._plain(args, size, val_fraction)
        told = [name for name in TOLD_BY_STORE if getattr(args, name) is not None]
        if told:
            raise ConfigError(f"--{told[0].replace('_', '-')}: --store says it already. Leave one of them out.")
        manifest = Manifest.read(args.store)
        transform = manifest.transform
        rules = Rules(transform["background"], transform.get("orientation", "stored"), transform.get("grey_bits"))
        val_fraction = float(manifest.encoding.get("val_fraction", 0.0))
        source = _listed(args, rules, val_fraction)
        if source.fingerprint.sha256 != manifest.source.sha256:
            theirs, ours = manifest.source, source.fingerprint
            raise StoreError(
                f"--store {args.store} was not made of --images {args.images}: it has {theirs.images:,} images of "
                f"{theirs.bytes:,} bytes ({theirs.kind}), these are {ours.images:,} of {ours.bytes:,} ({ours.kind}), "
                "or they have other names or classes. Give the source, and the --val-labels, --class-names and "
                "--source-kind, that were tokenized."
            )
        size = int(transform["size"])
        left_out = {name: frozenset(entry.key for entry in split.quarantine) for name, split in manifest.splits.items()}
        resize = transform["resize_shorter_side"] / size
        return cls(source, size, resize, rules, val_fraction, left_out, args.store)

    @classmethod
    def _plain(cls, args: argparse.Namespace, size: int | None, val_fraction: float) -> RealImages:
        rules = Rules(args.background or "white", args.orientation or "stored", args.grey_bits)
        share = val_fraction if args.val_fraction is None else args.val_fraction
        if not 0 <= share < 1:
            raise ConfigError(f"--val-fraction {share}: expected a share from 0 to below 1.")
        size = args.size or size
        if size is None:
            raise ConfigError("--size: say how many pixels a side the images are compared at, or give --store.")
        return cls(_listed(args, rules, share), size, args.resize or RESIZE, rules, share)

    def pick(self, split: str, count: int | None) -> list[Item]:
        """The images of a split without what the store left out; `count` of them, evenly chosen by a fixed order."""
        left_out = self.left_out.get(split, frozenset())
        items = [item for item in self.source.splits[split] if item.key not in left_out]
        if count is None or count >= len(items):
            return items
        chosen = np.zeros(len(items), dtype=bool)
        chosen[mixed(len(items))[:count]] = True
        return [item for item, kept in zip(items, chosen, strict=True) if kept]

    def pictures(self, split: str, count: int | None, bad: SkipBad) -> ListedPictures:
        """Raises ImageError where the split is empty."""
        items, where = self.pick(split, count), f"images {self.where}, {split}"
        if not items:
            raise ImageError(
                f"{where}: no images. Hold some out (--val-fraction), add a val/, or compare with --split train."
            )
        cut = CentreView(self.size, self.resize)
        return ListedPictures(where, items, self.source.reader, cut, (self.size, self.size), bad)

    @property
    def where(self) -> str:
        return str(getattr(self.source, "contents").where)  # noqa: B009

    def describe(self) -> dict[str, Any]:
        """For a record."""
        return {
            "source": self.where,
            "source_sha256": self.source.fingerprint.sha256,
            "store": None if self.store is None else str(self.store),
            "size": self.size,
            "resize_shorter_side": round(self.resize * self.size),
            "filter": "lanczos",
            **self.rules.describe(),
            "val_fraction": self.val_fraction,
            "left_out": sum(map(len, self.left_out.values())),
            "classes": len(self.source.classes),
        }


def _listed(args: argparse.Namespace, rules: Rules, val_fraction: float) -> Source:
    source = open_images(
        args.images,
        args.source_kind,
        val_fraction=val_fraction,
        rules=rules,
        val_labels=args.val_labels,
        class_names=args.class_names,
        cache=args.source_cache,
    )
    say_notes(source)
    return source
