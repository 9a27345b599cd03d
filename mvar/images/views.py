"""Views: the fixed-size crops of an image that the tokenizer encodes. Each is a pure function of (seed, key, view).

The published augmentation is a resize of the shorter side to 1.125 x the size (Lanczos), then a random crop, without
flips; validation takes the centre of the same resize.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from mvar.errors import ConfigError, ImageError

Pixels = npt.NDArray[np.uint8]
RESIZE = 1.125
HFlip = Literal["off", "both"]


def centre_view(image: Image.Image, size: int, resize: float = RESIZE) -> Pixels:
    """The centre `size` x `size` pixels after the resize; uint8 (size, size, 3)."""
    resized = resize_shorter_side(image, size, resize)
    return _crop(resized, round((resized.width - size) / 2), round((resized.height - size) / 2), size)


def random_crop_view(image: Image.Image, size: int, seed: int, key: str, view: int, resize: float = RESIZE) -> Pixels:
    """A `size` x `size` crop after the resize, placed by a hash of (seed, key, view); uint8 (size, size, 3)."""
    return _random_crop(resize_shorter_side(image, size, resize), size, seed, key, view)


def resize_shorter_side(image: Image.Image, size: int, resize: float = RESIZE) -> Image.Image:
    """`image` (RGB) with its shorter side at round(resize x size) pixels, Lanczos; the aspect ratio is kept."""
    target = round(resize * size)
    if target < size:
        raise ConfigError(f"resize: got {resize}, expected at least 1, so that a crop fits into the resized image.")
    shorter, longer = sorted(image.size)
    if shorter < 1:
        raise ImageError(f"image of {image.width} x {image.height} pixels: expected at least one. Remove it.")
    if shorter == target:
        return image
    other = int(target * longer / shorter)
    wide = image.width >= image.height
    return image.resize((other, target) if wide else (target, other), Image.Resampling.LANCZOS)


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
        resized = resize_shorter_side(image, self.size, self.resize)
        return np.stack([self._render_one(resized, name, seed, key) for name in self.names])

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for a manifest."""
        return {
            "size": self.size,
            "resize_shorter_side": round(self.resize * self.size),
            "filter": "lanczos",
            "views": list(self.names),
        }

    def _render_one(self, resized: Image.Image, name: str, seed: int, key: str) -> Pixels:
        plain = name.removesuffix("-mirror")
        if plain.startswith("crop"):
            pixels = _random_crop(resized, self.size, seed, key, int(plain[4:]))
        else:
            x_share, y_share = (0.5, 0.5) if plain == "center" else _CORNERS[plain]
            right, down = resized.width - self.size, resized.height - self.size
            pixels = _crop(resized, round(right * x_share), round(down * y_share), self.size)
        return pixels if plain == name else np.ascontiguousarray(pixels[:, ::-1])


_CORNERS = {
    "ten-center": (0.5, 0.5),
    "ten-top-left": (0.0, 0.0),
    "ten-top-right": (1.0, 0.0),
    "ten-bottom-left": (0.0, 1.0),
    "ten-bottom-right": (1.0, 1.0),
}


def _random_crop(resized: Image.Image, size: int, seed: int, key: str, view: int) -> Pixels:
    digest = hashlib.blake2b(f"{seed}\n{view}\n{key}".encode(), digest_size=16, person=b"mvar-crop").digest()
    across, down = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    left = across * (resized.width - size + 1) >> 64
    top = down * (resized.height - size + 1) >> 64
    return _crop(resized, left, top, size)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
