"""Views: the fixed-size crops of an image that the tokenizer encodes. Each is a pure function of (seed, key, view).

The published augmentation is a resize of the shorter side to 1.125 x the size (Lanczos), then a random crop, without
flips; validation takes the centre of the same resize. A picture that would be huge after it is resized crop by crop.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvar.errors import ConfigError, ImageError

Pixels = npt.NDArray[np.uint8]
RESIZE = 1.125
LARGEST_RESIZED = 1 << 26
"""Pixels after the resize, up to which it is done as a whole: 256 MiB."""
LANCZOS_REACH = 3
"""Pixels to each side that the filter looks at; where it makes smaller, so many of the smaller ones."""
DARK, FLAT = 32, 8
"""Of 256 values: a brightest one below the first, a range below the second is suspicious."""
HFlip = Literal["off", "both"]


def centre_view(image: Image.Image, size: int, resize: float = RESIZE) -> Pixels:
    """The centre `size` x `size` pixels after the resize; uint8 (size, size, 3)."""
    frame = Frame.of(image, size, resize)
    return frame.crop(round((frame.width - size) / 2), round((frame.height - size) / 2), size)


def random_crop_view(image: Image.Image, size: int, seed: int, key: str, view: int, resize: float = RESIZE) -> Pixels:
    """A `size` x `size` crop after the resize, placed by a hash of (seed, key, view); uint8 (size, size, 3)."""
    return _random_crop(Frame.of(image, size, resize), size, seed, key, view)


def is_suspicious(views: Pixels) -> bool:
    """Whether pixels are all nearly black, or all nearly the same: rather a wrong reading of a picture than one."""
    darkest, brightest = int(views.min()), int(views.max())
    return brightest < DARK or brightest - darkest < FLAT


def resize_shorter_side(image: Image.Image, size: int, resize: float = RESIZE) -> Image.Image:
    """`image` (RGB) with its shorter side at round(resize x size) pixels, Lanczos; the aspect ratio is kept."""
    wanted = _resized_size(image, size, resize)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Frame:
    """A picture as if it was resized, in pixels of then: `width`, `height`.

    `image` is what has to be kept to make crops: the resized picture, or the original where that would be huge.
    """

    image: Image.Image
    width: int
    height: int

    @classmethod
    def of(cls, image: Image.Image, size: int, resize: float = RESIZE) -> Frame:
        """Of an RGB picture, or again of a frame's `image`, which changes nothing. Raises ConfigError, ImageError."""
        width, height = _resized_size(image, size, resize)
        whole = width * height <= LARGEST_RESIZED
        return cls(resize_shorter_side(image, size, resize) if whole else image, width, height)

    def crop(self, left: int, top: int, size: int) -> Pixels:
        """`size` x `size` pixels from (left, top) on: uint8 (size, size, 3)."""
        if self.image.size == (self.width, self.height):
            return np.asarray(self.image.crop((left, top, left + size, top + size)), dtype=np.uint8)
        begin_x, end_x, first, last = _source(left, size, self.image.width, self.width)
        begin_y, end_y, upper, lower = _source(top, size, self.image.height, self.height)
        window = self.image.crop((begin_x, begin_y, end_x, end_y))
        resized = window.resize((size, size), Image.Resampling.LANCZOS, (first, upper, last, lower))
        return np.asarray(resized, dtype=np.uint8)


def _source(start: int, size: int, length: int, resized_length: int) -> tuple[int, int, float, float]:
    """What a crop along one side is made of: pixels [begin, end) of the original, and where in these it begins and
    ends."""
    scale = length / resized_length
    first, last = start * scale, (start + size) * scale
    reach = LANCZOS_REACH * max(scale, 1.0) + 1
    begin, end = max(0, math.floor(first - reach)), min(length, math.ceil(last + reach))
    return begin, end, first - begin, min(last, end) - begin


def _resized_size(image: Image.Image, size: int, resize: float) -> tuple[int, int]:
    target = round(resize * size)
    if target < size:
        raise ConfigError(f"resize: got {resize}, expected at least 1, so that a crop fits into the resized image.")
    shorter, longer = sorted(image.size)
    if shorter < 1:
        raise ImageError(f"image of {image.width} x {image.height} pixels: expected at least one. Remove it.")
    other = longer if shorter == target else int(target * longer / shorter)
    return (other, target) if image.width >= image.height else (target, other)


@dataclass(frozen=True)
class ViewPlan:
    """Which views of an image are made, in which order: centre, ten-crop, random crops; each followed by its mirror.

    `ten_crop` is the centre and the four corners with their mirrors, so it goes without `hflip`. Raises ConfigError
    unless there is at least one view.
    """

    size: int
    resize: float = RESIZE
    random_crops: int = 1
    center: bool = False
    ten_crop: bool = False
    hflip: HFlip = "off"

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("views: random_crops is 0 and neither center nor ten_crop is set; ask for at least one.")
        if self.ten_crop and (self.hflip == "both" or self.center):
            raise ConfigError("views: ten_crop holds the centre and the mirrors already; set hflip=off, center=false.")

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each view, in order: `crop0`, `crop0-mirror`, ..."""
        plain = ["center"] * self.center + list(_CORNERS) * self.ten_crop
        plain += [f"crop{number}" for number in range(self.random_crops)]
        names = []
        for name in plain:
            names.append(name)
            if self.hflip == "both" or name in _CORNERS:
                names.append(f"{name}-mirror")
        return tuple(names)

    def render(self, image: Image.Image, seed: int, key: str) -> Pixels:
        """All views of one image (RGB): uint8 (views, size, size, 3)."""
        frame = Frame.of(image, self.size, self.resize)
        return np.stack([self._render_one(frame, name, seed, key) for name in self.names])

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for a manifest."""
        return {
            "size": self.size,
            "resize_shorter_side": round(self.resize * self.size),
            "filter": "lanczos",
            "views": list(self.names),
        }

    def _render_one(self, frame: Frame, name: str, seed: int, key: str) -> Pixels:
        plain = name.removesuffix("-mirror")
        if plain.startswith("crop"):
            pixels = _random_crop(frame, self.size, seed, key, int(plain[4:]))
        else:
            x_share, y_share = (0.5, 0.5) if plain == "center" else _CORNERS[plain]
            right, down = frame.width - self.size, frame.height - self.size
            pixels = frame.crop(round(right * x_share), round(down * y_share), self.size)
        return pixels if plain == name else np.ascontiguousarray(pixels[:, ::-1])


_CORNERS = {
    "ten-center": (0.5, 0.5),
    "ten-top-left": (0.0, 0.0),
    "ten-top-right": (1.0, 0.0),
    "ten-bottom-left": (0.0, 1.0),
    "ten-bottom-right": (1.0, 1.0),
}


def _random_crop(frame: Frame, size: int, seed: int, key: str, view: int) -> Pixels:
    digest = hashlib.blake2b(f"{seed}\n{view}\n{key}".encode(), digest_size=16, person=b"mvar-crop").digest()
    across, down = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    left = across * (frame.width - size + 1) >> 64
    top = down * (frame.height - size + 1) >> 64
    return frame.crop(left, top, size)
