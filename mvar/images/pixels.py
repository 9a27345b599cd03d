"""The bytes of an image file as an RGB picture, however odd the file is."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mvar.errors import ImageError

Background = Literal["white", "black", "drop"]
"""What shows through transparent pixels: white, black, or whatever colour is stored under them."""


class DamagedImageError(ImageError):
    """An image whose bytes were read and are no picture: it will be so every time, on every machine."""

    @property
    def reason(self) -> str:
        """What the decoder said, without the path."""
        return str(self).partition("cannot be decoded (")[2].partition("). Replace")[0]


@dataclass(frozen=True)
class FileReader:
    """Reads image files: see `decode`."""

    background: Background = "white"

    def __call__(self, path: str | Path) -> Image.Image:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ImageError(
                f"image {path}: cannot be read ({error.strerror}). Mend or remove it, then run the command again."
            ) from None
        return decode(data, str(path), self.background)


def decode(data: bytes, name: str, background: Background) -> Image.Image:
    """The picture in the bytes of an image file, mode RGB. Raises DamagedImageError.

    The name's extension does not matter (ImageNet has a PNG named .JPEG), CMYK and greyscale become RGB, 16-bit
    greyscale keeps its top 8 bits, EXIF orientation is not applied (as in the published pipeline). A picture with
    transparency is laid on `background`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image, background)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
        reason = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "the file", f"{type(error).__name__}: {error}")
        raise DamagedImageError(
            f"image {name}: cannot be decoded ({reason}). Replace or remove the file, then run the command again, or "
            "allow some images to be left out (--skip-bad N)."
        ) from None


def to_rgb(image: Image.Image, background: Background = "white") -> Image.Image:
    """`image` in mode RGB; transparency is laid on `background`."""
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would saturate to white.
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent and background != "drop":
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    if transparent:
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_rgb(path: str | Path, background: Background = "white") -> Image.Image:
    """The picture in `path`, mode RGB (see FileReader). Raises ImageError."""
    return FileReader(background)(path)
