"""What the prepare scripts share: writing class folders of PNGs, completely or not at all, as often as one likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvar.files.disk import writing


def write_png(path: Path, image: Image.Image) -> bool:
    """Write a PNG unless it is there; False if it was. It appears under its name only when it is complete."""
    if path.exists() and path.stat().st_size:  # A crash of the machine can leave it empty.
        return False
    with writing(path, sync=False) as file:
        image.save(file, format="PNG")
    return True


def padded(image_HW: NDArray[np.uint8], size: int, fill: int = 0) -> Image.Image:
    """A greyscale picture in the middle of `size` x `size` pixels of `fill`."""
    top, left = (size - image_HW.shape[0]) // 2, (size - image_HW.shape[1]) // 2
    canvas = np.full((size, size), fill, dtype=np.uint8)
    canvas[top : top + image_HW.shape[0], left : left + image_HW.shape[1]] = image_HW
    return Image.fromarray(canvas)
