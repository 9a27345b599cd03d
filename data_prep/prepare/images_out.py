"""What the prepare scripts share: writing class folders of PNGs, completely or not at all, as often as one likes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_png(path: Path, image: Image.Image) -> bool:
    """Write a PNG unless it is there; False if it was. It appears under its name only when it is complete."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
    return True


def padded(image_HW: NDArray[np.uint8], size: int, fill: int = 0) -> Image.Image:
    """A greyscale picture in the middle of `size` x `size` pixels of `fill`."""
    top, left = (size - image_HW.shape[0]) // 2, (size - image_HW.shape[1]) // 2
    canvas = np.full((size, size), fill, dtype=np.uint8)
    canvas[top : top + image_HW.shape[0], left : left + image_HW.shape[1]] = image_HW
    return Image.fromarray(canvas)
