"""The .npz that papers' evaluations read: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,) classes.

It is written image after image, so that memory does not grow with N, and its bytes depend on nothing but its content.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mvar.errors import ImageError
from mvar.images.arrays import Bytes

IMAGES, LABELS = "arr_0", "arr_1"
TIME = (1980, 1, 1, 0, 0, 0)
"""Modification time of the members: the earliest that a zip can tell."""


def write_npz(file: BinaryIO, side: int, images_NHWC: Iterable[Bytes], labels_N: NDArray[np.int64]) -> None:
    """Write as many images, one by one, as there are labels."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, IMAGES) as member:
            shape = (len(labels_N), side, side, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            written = 0
            for image_HWC in images_NHWC:
                assert image_HWC.shape == shape[1:] and image_HWC.dtype == np.uint8
                member.write(np.ascontiguousarray(image_HWC).data)
                written += 1
            assert written == len(labels_N)
        with _member(archive, LABELS) as member:
            np.lib.format.write_array(member, labels_N.astype("<i8"), (1, 0), allow_pickle=False)


def read_npz(path: Path, count: int, side: int) -> Bytes:
    """All images of a small one. Raises ImageError: not `count` images of `side` pixels."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images_NHWC: Bytes = arrays[IMAGES]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ImageError(f"{path}: cannot be read as .npz ({error}). Remove it and draw again.") from None
    expected = (count, side, side, 3)
    if images_NHWC.shape != expected or images_NHWC.dtype != np.uint8:
        raise ImageError(
            f"{path}: {IMAGES} is {images_NHWC.dtype} {images_NHWC.shape}, expected uint8 {expected}. It is another "
            "job's: remove it and draw again."
        )
    return images_NHWC


@contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    info = zipfile.ZipInfo(f"{name}.npy", TIME)
    info.external_attr = 0o644 << 16
    info.create_system = 3  # Unix, wherever it is written.
    with archive.open(info, "w", force_zip64=True) as member:
        yield member
