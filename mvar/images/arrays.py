"""Pictures as arrays: between model range and bytes, onto disk, side by side.

Legend: B images, C channels, H height, W width, N images of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvar.files.disk import writing

Bytes = NDArray[np.uint8]
LOSSLESS_PIXELS = 1 << 18
"""Of a film's frame."""


def to_uint8(images_BCHW: Tensor) -> Bytes:
    """Model range to bytes: float [-1, 1] (B, 3, H, W) -> uint8 (B, H, W, 3), clamped and rounded to nearest."""
    scaled_BCHW = (images_BCHW.detach().float().clamp(-1, 1) + 1) * 127.5
    array: Bytes = scaled_BCHW.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def from_uint8(array_BHWC: Bytes) -> Tensor:
    """Bytes to model range: uint8 (B, H, W, 3) -> float32 [-1, 1] (B, 3, H, W). The inverse of `to_uint8`."""
    return to_model_range(torch.from_numpy(np.ascontiguousarray(array_BHWC)))


def to_model_range(bytes_BHWC: Tensor) -> Tensor:
    """`from_uint8` of a tensor, where that is: the same bits on a CPU and on a GPU."""
    # By a tensor on the device: a GPU would divide by a plain number through its rounded reciprocal.
    half = torch.full((), 127.5, device=bytes_BHWC.device)
    return bytes_BHWC.permute(0, 3, 1, 2).float() / half - 1


def save_png(path: Path, array_HWC: Bytes, *, sync: bool = True) -> None:
    """Write uint8 (H, W, 3) as PNG: complete or absent (`sync`: see `writing`). Raises WriteError."""
    with writing(path, sync=sync) as file:
        Image.fromarray(array_HWC).save(file, format="PNG")


def save_film(path: Path, frames_NHWC: Sequence[Bytes], frame_s: float = 0.4, last_s: float = 1.6) -> None:
    """Write equal pictures, uint8 (H, W, 3), as an animated WebP that begins again when it ends: complete or absent.

    Small frames keep every bit. `frame_s`, `last_s`: how long each is shown, and the last. Raises WriteError.
    """
    first, *others = [Image.fromarray(frame) for frame in frames_NHWC]
    shown_ms = [round(1000 * frame_s)] * len(others) + [round(1000 * last_s)]
    lossless = first.width * first.height <= LOSSLESS_PIXELS
    with writing(path) as file:
        first.save(
            file, format="WEBP", save_all=True, append_images=others, duration=shown_ms, loop=0, lossless=lossless,
            quality=90, method=4,
        )  # fmt: skip


def grid(array_NHWC: Bytes | Sequence[Bytes], columns: int, gap: int = 2) -> Bytes:
    """Lay out equal pictures row by row, `columns` a row, `gap` white pixels between: (N, H, W, 3) -> (H', W', 3)."""
    pictures = np.asarray(array_NHWC, dtype=np.uint8)
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    sheet: Bytes = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def enlarge(array_HWC: Bytes, factor: int) -> Bytes:
    """Repeat every pixel `factor` times in both directions, for small pictures that people look at."""
    return np.ascontiguousarray(array_HWC.repeat(factor, axis=0).repeat(factor, axis=1))
