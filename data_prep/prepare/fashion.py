"""Fashion-MNIST as an image folder: 60,000 + 10,000 product photographs, from Debian's dataset-fashion-mnist."""

from __future__ import annotations

import argparse
import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.prepare.images_out import padded, write_png
from mvar.cli import run_command
from mvar.errors import ImageError

DATA = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FILES = {"train": "train", "val": "t10k"}


def prepare(out: Path, data: Path = DATA, size: int = 32, limit: int | None = None) -> int:
    """Write out/train/<class>/ and out/val/<class>/ of greyscale PNGs; returns the images.

    `limit`: only the first so many of each split. Folders are named with the class number first, so that their order
    is that of the labels. What is there already is kept. Raises ImageError where the data files are missing or damaged.
    """
    written = 0
    for split, stem in FILES.items():
        images_NHW = read_idx(data / f"{stem}-images-idx3-ubyte.gz", dimensions=3)[:limit]
        labels_N = read_idx(data / f"{stem}-labels-idx1-ubyte.gz", dimensions=1)[:limit]
        if len(images_NHW) != len(labels_N) or int(labels_N.max(initial=0)) >= len(CLASSES):
            raise ImageError(f"Fashion-MNIST in {data}: {stem} images and labels do not belong together.")
        for number, (image_HW, label) in enumerate(zip(images_NHW, labels_N, strict=True)):
            folder = out / split / f"{label}-{CLASSES[label]}"
            write_png(folder / f"{number:05d}.png", padded(image_HW, size))
        written += len(labels_N)
    return written


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes as an array. Raises ImageError."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, found, *shape = struct.unpack_from(f">HBB{dimensions}I", data)
        array = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions)
        if (zeros, kind, found) != (0, 8, dimensions):
            raise ValueError(f"not an IDX file of bytes with {dimensions} dimensions")
        return array.reshape(shape)
    except OSError as error:
        raise ImageError(
            f"Fashion-MNIST file {path}: cannot be read ({error.strerror or error}). "
            "Install it with apt-get install dataset-fashion-mnist, or give its folder with --data."
        ) from None
    except (ValueError, EOFError, struct.error, zlib.error) as error:
        raise ImageError(f"Fashion-MNIST file {path}: damaged ({error}). Install it again.") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fashion-MNIST as an image folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train/ and val/ into")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of the *-ubyte.gz files; default {DATA}")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures; they are padded with black")
    parser.add_argument("--limit", type=int, help="only the first so many images of each split")
    args = parser.parse_args(argv)
    print(f"{prepare(args.out, args.data, args.size, args.limit):,} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
