"""A user's picture and what of it is to be redrawn, as pixels of the size that a tokenizer takes.

A picture of another size or shape is fitted: its centre square is resized. Or it is placed on a canvas of the
tokenizer's size, and all around it is to be drawn. Its mask goes the same way.

Shapes: H = W side of the canvas in pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvar.errors import ConfigError, ImageError
from mvar.images.arrays import Bytes
from mvar.images.pixels import DamagedImageError, read_rgb
from mvar.images.views import centre_view

Redrawn = NDArray[np.bool_]


@dataclass(frozen=True)
class Area:
    """A rectangle of pixels: the top left one, and how many across and down."""

    left: int
    top: int
    width: int
    height: int

    @classmethod
    def parse(cls, flag: str, text: str) -> Area:
        """Of "x,y,w,h". Raises ConfigError."""
        if not re.fullmatch(r"\d+(,\d+){3}", text):
            raise ConfigError(f"{flag} {text}: expected x,y,w,h in pixels, such as 64,64,128,128.")
        return cls(*map(int, text.split(",")))

    def within(self, flag: str, what: str, width: int, height: int) -> Area:
        """Itself. Raises ConfigError where it is empty or does not lie within so many pixels."""
        right, bottom = self.left + self.width, self.top + self.height
        if min(self.width, self.height) < 1 or right > width or bottom > height:
            raise ConfigError(
                f"{flag} {self.left},{self.top},{self.width},{self.height}: not an area of {what}, which has"
                f" {width} x {height} pixels."
            )
        return self

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """As Pillow wants it."""
        return self.left, self.top, self.left + self.width, self.top + self.height


@dataclass(frozen=True)
class Canvas:
    """What is edited. `picture`: uint8 (H, W, 3); `redrawn`: bool (H, W), pixels that are to be drawn anew."""

    picture_HWC: Bytes
    redrawn_HW: Redrawn

    @classmethod
    def of(
        cls, image: Path, size: int, *, mask: Path | None = None, box: Area | None = None, place: Area | None = None
    ) -> Canvas:
        """`mask`: a picture of the image's size, redrawn where it is white (by half at least); `box`: an area of the
        image that is redrawn; `place`: where on the canvas the image goes. Raises ConfigError, ImageError."""
        picture = _read("--image", image)
        marked = Image.new("RGB", picture.size)
        if mask is not None:
            marked = _read("--mask", mask)
            if marked.size != picture.size:
                raise ConfigError(
                    f"--mask {mask}: has {marked.width} x {marked.height} pixels, and the image {picture.width} x"
                    f" {picture.height}. Give a mask of the image's size."
                )
        if box is not None:
            marked.paste((255, 255, 255), box.within("--box", "the image", *picture.size).corners)
        if place is None:
            return cls(centre_view(picture, size, 1.0), _is_white(centre_view(marked, size, 1.0)))
        corners = place.within("--place", "the canvas", size, size).corners
        canvas, around = Image.new("RGB", (size, size)), Image.new("RGB", (size, size), (255, 255, 255))
        inside = (place.width, place.height)
        canvas.paste(picture.resize(inside, Image.Resampling.LANCZOS), corners)
        around.paste(marked.resize(inside, Image.Resampling.LANCZOS), corners)
        return cls(np.asarray(canvas), _is_white(np.asarray(around)))


def _read(flag: str, path: Path) -> Image.Image:
    """Raises ImageError."""
    try:
        return read_rgb(path, "black" if flag == "--mask" else "white")
    except DamagedImageError as error:
        raise ImageError(
            f"{flag} {path}: is no picture that can be read ({error.reason}). Give a PNG, JPEG, WebP or another that"
            " Pillow reads."
        ) from None


def _is_white(pixels_HWC: Bytes) -> Redrawn:
    white: Redrawn = np.asarray(Image.fromarray(pixels_HWC).convert("L")) >= 128
    return white
