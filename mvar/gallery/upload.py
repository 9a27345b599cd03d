"""A picture and the mask painted over it, as the page gives them, read exactly as `mvar edit` reads its files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mvar.errors import ConfigError
from mvar.images.arrays import Bytes
from mvar.sampling.canvas import Canvas
from mvar.sampling.packing import encode_png


def pictures_of(painted: Mapping[str, Any] | None) -> tuple[bytes, bytes]:
    """Picture and mask as PNG files, the mask white where anything was painted.

    `painted`: `background` and `layers`, uint8 (H, W, 4), as Gradio's ImageEditor has them. Raises ConfigError.
    """
    background = None if painted is None else painted.get("background")
    if painted is None or background is None or not np.asarray(background)[..., 3].any():
        raise ConfigError("no picture yet. Drop one onto the canvas, or choose a file there.")
    marked = np.zeros(background.shape[:2], bool)
    for layer in painted.get("layers") or ():
        marked |= np.asarray(layer)[..., 3] > 0
    if not marked.any():
        raise ConfigError("nothing is marked. Paint over the part of the picture that is to be redrawn.")
    mask: Bytes = np.where(marked, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    flat = Image.new("RGBA", (background.shape[1], background.shape[0]), (255, 255, 255, 255))
    flat.alpha_composite(Image.fromarray(np.asarray(background, np.uint8)))
    return encode_png(np.asarray(flat.convert("RGB"))), encode_png(mask)


def canvas_of(picture: bytes, mask: bytes, size: int) -> Canvas:
    """Through files, as the command would: the same checks and the same pixels. Raises ConfigError, ImageError."""
    with tempfile.TemporaryDirectory(prefix="mvar-gallery-") as folder:
        image, over = Path(folder) / "picture.png", Path(folder) / "mask.png"
        image.write_bytes(picture)
        over.write_bytes(mask)
        return Canvas.of(image, size, mask=over)
