"""The bytes of an image file as an RGB picture, however odd the file is."""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from mvar.errors import ImageError

Background = Literal["white", "black", "drop"]
"""What shows through transparent pixels: white, black, or whatever colour is stored under them."""
Orientation = Literal["stored", "exif"]
"""How a picture lies: as its pixels are stored (the published pipeline), or turned as its EXIF data say."""
GreyBits = Annotated[int, Field(ge=8, le=31)]
"""Bits of greyscale values that are deeper than 8."""
LARGEST_PIXELS = 1 << 28
"""Pixels of a picture, at most: in memory they take four times as many bytes."""
LARGEST_BYTES = 1 << 30
"""Of an image file."""
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALLEST_WHITE = 1 << 12
"""Pictures of 16 bits whose brightest value is below this are taken for values of fewer bits."""

# Pillow's limit, which it calls damage, must not lie below ours.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, LARGEST_PIXELS)


class DamagedImageError(ImageError):
    """An image whose bytes were read and give no picture: they will give none every time, on every machine."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def reason(self) -> str:
        """What is wrong, without the path."""
        return str(self.args[1])


class ImageSizeError(DamagedImageError):
    """An image that is larger than our limits, whatever is in it."""


class ImageDepthError(DamagedImageError):
    """A picture of more than 8 bits whose values have no certain meaning."""


@dataclass(frozen=True)
class Rules:
    """How the bytes of a file become an RGB picture.

    `grey_bits`: how many bits the values of greyscale pictures deeper than 8 bits have; None: as many as the file's
    format says.
    """

    background: Background = "white"
    orientation: Orientation = "stored"
    grey_bits: int | None = None

    def describe(self) -> dict[str, Any]:
        """The rules as plain data, for a store; of those that came later only what differs from their default."""
        told: dict[str, Any] = {"background": self.background}
        told |= {} if self.orientation == "stored" else {"orientation": self.orientation}
        return told | ({} if self.grey_bits is None else {"grey_bits": self.grey_bits})


AS_PUBLISHED = Rules()


@dataclass(frozen=True)
class FileReader(Rules):
    """Reads image files: see `decode`."""

    def __call__(self, path: str | Path, size_bytes: int | None = None) -> Image.Image:
        """`size_bytes`: of the file when it was listed, if it has to be the same. Raises ImageError."""
        try:
            with open(path, "rb") as file:
                found_bytes = os.fstat(file.fileno()).st_size
                data = file.read() if found_bytes <= LARGEST_BYTES else b""
        except OSError as error:
            raise ImageError(
                f"image {path}: cannot be read ({error.strerror}). Mend or remove it, then run the command again."
            ) from None
        if size_bytes is not None and found_bytes != size_bytes:
            raise ImageError(
                f"image {path}: has {found_bytes:,} bytes, and had {size_bytes:,} when the images were listed. Put it "
                "back as it was; or, if it changed on purpose, remove the store's listing.json.gz and run again."
            )
        if found_bytes > LARGEST_BYTES:
            raise too_large(str(path), f"{found_bytes:,} bytes, more than {LARGEST_BYTES:,}")
        return decode(data, str(path), self)


def decode(data: bytes, name: str, rules: Rules) -> Image.Image:
    """The picture in the bytes of an image file, mode RGB. Raises DamagedImageError.

    The name's extension does not matter (ImageNet has a PNG named .JPEG), CMYK and greyscale become RGB, of greyscale
    deeper than 8 bits the upper 8 are kept (see `_shallow`), transparency is laid on the rules' background.
    """
    try:
        return _rgb(_oriented(*_loaded(data, name), name, rules), rules.background)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes.
        reason = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "the file", f"{type(error).__name__}: {error}")
        raise DamagedImageError(
            f"image {name}: cannot be decoded ({reason}). Replace or remove the file, then run the command again, or "
            "allow some images to be left out (--skip-bad N; skip_bad=N where a tokenizer is trained).",
            reason,
        ) from None


def read_rgb(path: str | Path, background: Background = "white") -> Image.Image:
    """The picture in `path`, mode RGB (see FileReader). Raises ImageError."""
    return FileReader(background)(path)


def _loaded(data: bytes, name: str) -> tuple[Image.Image, str]:
    """The decoded picture, and how its values are stored, in Pillow's words. Raises almost anything."""
    try:
        return _load(data, name)
    except (MemoryError, ImageError):
        raise
    except Exception:
        # Pillow takes texts and profiles above its limits for damage; the picture needs neither.
        slim = _without_texts(data)
        if slim is None:
            raise
        return _load(slim, name)


def _load(data: bytes, name: str) -> tuple[Image.Image, str]:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise too_large(name, f"more than {2 * LARGEST_PIXELS:,} pixels") from None
    if image.width * image.height > LARGEST_PIXELS:
        raise too_large(name, f"{image.width} x {image.height} pixels, more than {LARGEST_PIXELS:,}")
    raw = _raw_mode(image)
    image.load()
    return image, raw


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel, such as `RGB;16B`; empty where the format does not tell."""
    for tile in getattr(image, "tile", [])[:1]:
        arguments = tile[3]
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        return first if isinstance(first, str) else ""
    return ""


def _without_texts(data: bytes) -> bytes | None:
    """A PNG without its texts and colour profile; None where there are none."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    slim = b"".join(kept)
    return slim if len(slim) < len(data) else None


def _oriented(image: Image.Image, raw: str, name: str, rules: Rules) -> Image.Image:
    """The picture with at most 8 bits a value, turned if the rules want it so. Raises ImageDepthError."""
    turn = None
    if rules.orientation == "exif":
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
        except Exception:  # Broken EXIF data turn nothing.
            turn = None
    image = _shallow(image, raw, name, rules.grey_bits)
    return image if turn is None else image.transpose(turn)


def _shallow(image: Image.Image, raw: str, name: str, grey_bits: int | None) -> Image.Image:
    """Deep greyscale as its upper 8 bits, where it is certain which these are; other pictures as they are.

    16 bits are 16 unless the picture uses the lower 12 alone, which is how cameras and scanners store 8 to 12 bits;
    `grey_bits` says so. 32-bit integers need `grey_bits`, floating point has no white.
    """
    if image.mode == "F":
        raise _unclear(name, "floating-point greyscale: which value is white?", "Convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        if ";16" in raw and image.mode != "CMYK" and max(high for _, high in _extrema(image)) < SMALLEST_WHITE >> 8:
            what = f"16-bit colours below {SMALLEST_WHITE}: values of fewer bits, or a black picture"
            raise _unclear(name, what, "Convert it to 8 bits")
        return image
    values = np.asarray(image)
    lowest, highest = int(values.min()), int(values.max())
    bits = grey_bits or _format_bits(image, raw)
    if bits is None:
        what = f"32-bit greyscale with values from {lowest} to {highest}: which is white?"
        raise _unclear(name, what, "Say how many bits they have (grey_bits=N), or convert it to 8 or 16 bits")
    if lowest < 0 or highest >> bits:
        what = f"greyscale with values from {lowest} to {highest}, which {bits} bits do not hold"
        raise _unclear(name, what, "Set grey_bits to what the images have, or convert them to 8 or 16 bits")
    if grey_bits is None and bits == 16 and 0 < highest < SMALLEST_WHITE:
        what = f"16-bit greyscale with values up to {highest}: values of fewer bits, or a dark picture"
        raise _unclear(name, what, "Say how many bits the images have (grey_bits=8, 12 or 16)")
    upper: NDArray[np.uint8] = (values.astype(np.uint32) >> (bits - 8)).astype(np.uint8)
    return Image.fromarray(upper)


def _format_bits(image: Image.Image, raw: str) -> int | None:
    """Bits of a deep greyscale value by the file's format; None for 32-bit files, which seldom use them all."""
    if raw == "I;12":
        return 12
    # PNG and PGM of 16 bits have mode I in some versions of Pillow, which scales the latter up to all 16.
    return 16 if image.mode != "I" or image.format in ("PNG", "PPM") else None


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    """Smallest and largest value of each channel but transparency."""
    channels = [channel for channel in image.getbands() if channel not in ("A", "a")]
    found: list[Any] = [image.getchannel(channel).getextrema() for channel in channels]
    return found


def _rgb(image: Image.Image, background: Background) -> Image.Image:
    """`image` in mode RGB; transparency is laid on `background`."""
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if transparent and background != "drop":
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
    if transparent:
        image = image.convert("RGBA")
    return image.convert("RGB")


def too_large(name: str, what: str) -> ImageSizeError:
    """The error for an image beyond our limits."""
    return ImageSizeError(
        f"image {name}: too large ({what}). Make it smaller or remove it, then run the command again, or allow some "
        "images to be left out (--skip-bad N; skip_bad=N where a tokenizer is trained).",
        f"too large: {what}",
    )


def _unclear(name: str, what: str, remedy: str) -> ImageDepthError:
    return ImageDepthError(
        f"image {name}: {what}. {remedy}, or allow some images to be left out (--skip-bad N; skip_bad=N where a "
        "tokenizer is trained).",
        what,
    )
