"""The .npz of a job: what numpy reads, the same bytes every time, and no more memory for more images."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mvar.errors import ImageError
from mvar.images.arrays import Bytes
from mvar.sampling.npz import read_npz, write_npz


def some(count: int, side: int = 6) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_numpy_reads_what_was_written_and_equal_images_give_equal_bytes() -> None:
    images_NHWC, labels_N = some(5), np.array([3, 1, 0, 999, 2])
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        write_npz(file, 6, images_NHWC, labels_N)
    assert files[0].getvalue() == files[1].getvalue()
    with np.load(io.BytesIO(files[0].getvalue()), allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert np.array_equal(arrays["arr_0"], images_NHWC)
        assert arrays["arr_1"].dtype == np.int64 and np.array_equal(arrays["arr_1"], labels_N)


def test_one_image_is_held_at_a_time() -> None:
    """What is written is forgotten: each image may be overwritten as soon as the next is asked for."""
    images_NHWC, buffer, file = some(200), np.empty((6, 6, 3), np.uint8), io.BytesIO()

    def one_after_the_other() -> Iterator[Bytes]:
        for image_HWC in images_NHWC:
            buffer[:] = image_HWC
            yield buffer
            buffer[:] = 0

    write_npz(file, 6, one_after_the_other(), np.zeros(200, np.int64))
    assert np.array_equal(np.load(io.BytesIO(file.getvalue()))["arr_0"], images_NHWC)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"not a zip"])
def test_what_is_no_npz_is_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "samples-000000.npz"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"samples-000000\.npz"):
        read_npz(path, 4, 6)


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, arr_0=np.array([object()], dtype=object))
    with pytest.raises(ImageError, match=r"cannot be read as \.npz"):
        read_npz(path, 1, 6)
    np.savez(path, arr_1=some(4))
    with pytest.raises(ImageError, match=r"cannot be read as \.npz"):
        read_npz(path, 4, 6)
