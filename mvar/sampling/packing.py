"""How the images of a part lie on disk: class folders of PNGs, tars of PNGs, or .npz files.

    folders    OUT/0207/00003.png             the class, and the image's number in it
    tars       OUT/samples-000004.tar         webdataset: <number in the job>.png and .cls
    npz        OUT/samples-000004.npz         arr_0 images, arr_1 classes

Files are complete or absent. In the order of the job's numbers, all three hold the same pixels.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mvar.errors import ImageError
from mvar.files.disk import BLOCK_BYTES, writing
from mvar.images.arrays import Bytes
from mvar.sampling.npz import read_npz, write_npz
from mvar.sampling.pictures import Picture

Kind = Literal["folders", "tars", "npz"]
MTIME_S = 1_000_000_000
"""Modification time of a tar's members: fixed, so that equal images give equal bytes."""


@dataclass(frozen=True)
class SamplePart:
    """A stretch of a job's images, drawn and written as one. `first`: number of its first image in the job."""

    number: int
    first: int
    pictures: tuple[Picture, ...]

    @property
    def name(self) -> str:
        return f"samples-{self.number:06d}"


class Packing(ABC):
    """Writes parts into `out` and reads them. `side`: of the images, in pixels."""

    encodes = True
    """Whether images are written as PNG."""

    def __init__(self, out: Path, side: int) -> None:
        self.out, self.side = out, side

    @abstractmethod
    def write(self, part: SamplePart, images: Sequence[Bytes], pngs: Sequence[bytes]) -> None:
        """Write a part whole. Raises WriteError."""

    @abstractmethod
    def files(self, part: SamplePart) -> list[Path]:
        """Where a part lies."""

    @abstractmethod
    def read(self, part: SamplePart, places: Iterable[int]) -> Iterator[Bytes]:
        """Some of a part's images, uint8 (H, W, 3), by their places in it. Raises ImageError."""

    def digest(self, part: SamplePart) -> tuple[int, str]:
        """Size of a part on disk, and SHA-256 of its files, one after the other. Raises OSError."""
        digest, size = hashlib.sha256(), 0
        for path in self.files(part):
            with path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
        return size, digest.hexdigest()


class FoldersPacking(Packing):
    def write(self, part: SamplePart, images: Sequence[Bytes], pngs: Sequence[bytes]) -> None:
        for path, png in zip(self.files(part), pngs, strict=True):
            with writing(path, sync=False) as file:  # The part's record tells if a crash left one empty.
                file.write(png)

    def files(self, part: SamplePart) -> list[Path]:
        return [picture.path(self.out) for picture in part.pictures]

    def read(self, part: SamplePart, places: Iterable[int]) -> Iterator[Bytes]:
        files = self.files(part)
        for place in places:
            yield decode_png(files[place], files[place], self.side)


class TarsPacking(Packing):
    def write(self, part: SamplePart, images: Sequence[Bytes], pngs: Sequence[bytes]) -> None:
        with (
            writing(self._path(part)) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, picture, png in zip(self._numbers(part), part.pictures, pngs, strict=True):
                for suffix, data in (("png", png), ("cls", str(picture.label).encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size, info.mtime, info.mode = len(data), MTIME_S, 0o644
                    tar.addfile(info, io.BytesIO(data))

    def files(self, part: SamplePart) -> list[Path]:
        return [self._path(part)]

    def read(self, part: SamplePart, places: Iterable[int]) -> Iterator[Bytes]:
        path, numbers = self._path(part), self._numbers(part)
        try:
            with tarfile.open(path, "r:") as tar:
                for place in places:
                    member = tar.extractfile(f"{numbers[place]:08d}.png")
                    assert member is not None
                    yield decode_png(io.BytesIO(member.read()), path, self.side)
        except (OSError, KeyError, tarfile.TarError) as error:
            raise ImageError(f"{path}: cannot be read ({error}). Remove it and draw again.") from None

    def _path(self, part: SamplePart) -> Path:
        return self.out / f"{part.name}.tar"

    def _numbers(self, part: SamplePart) -> range:
        return range(part.first, part.first + len(part.pictures))


class NpzPacking(Packing):
    encodes = False

    def write(self, part: SamplePart, images: Sequence[Bytes], pngs: Sequence[bytes]) -> None:
        labels_N = np.array([picture.label for picture in part.pictures], dtype=np.int64)
        with writing(self._path(part)) as file:
            write_npz(file, self.side, images, labels_N)

    def files(self, part: SamplePart) -> list[Path]:
        return [self._path(part)]

    def read(self, part: SamplePart, places: Iterable[int]) -> Iterator[Bytes]:
        images_NHWC = read_npz(self._path(part), len(part.pictures), self.side)
        for place in places:
            yield images_NHWC[place]

    def _path(self, part: SamplePart) -> Path:
        return self.out / f"{part.name}.npz"


PACKINGS: dict[Kind, type[Packing]] = {"folders": FoldersPacking, "tars": TarsPacking, "npz": NpzPacking}


def encode_png(image_HWC: Bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG")
    return buffer.getvalue()


def decode_png(source: Path | io.BytesIO, where: Path, side: int) -> Bytes:
    """uint8 (side, side, 3). Raises ImageError, which names `where`."""
    try:
        with Image.open(source) as image:
            size, array_HWC = image.size, np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ImageError(f"image {where}: cannot be read ({error}). Remove it and draw again.") from None
    if size != (side, side):
        raise ImageError(f"image {where}: is {size[0]} x {size[1]} pixels, the job's are {side} x {side}. Draw again.")
    return array_HWC
