"""Pictures: range, grid, and files that are whole or absent."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mvar.images.arrays import enlarge, from_uint8, grid, save_png, to_model_range, to_uint8


def test_bytes_become_the_same_numbers_wherever_they_are() -> None:
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    plain = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(from_uint8(array), plain)
    assert to_model_range(torch.from_numpy(array)).stride() == plain.stride()


def test_bytes_survive_the_round_trip() -> None:
    array = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert (to_uint8(from_uint8(array)) == array).all()


def test_values_beyond_the_range_are_clamped() -> None:
    images = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert to_uint8(images).ravel().tolist() == [0, 128, 255]


def test_grid_places_pictures_row_by_row() -> None:
    pictures = np.stack([np.full((2, 3, 3), value, np.uint8) for value in range(5)])
    sheet = grid(pictures, columns=3, gap=1)
    assert sheet.shape == (5, 11, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 4, 0] == 1 and sheet[3, 0, 0] == 3 and sheet[3, 8, 0] == 255


def test_png_holds_the_pixels_and_leaves_no_litter(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "a/b.png", array)
    assert (np.asarray(Image.open(tmp_path / "a/b.png")) == array).all()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.png"]


def test_enlarge_repeats_pixels() -> None:
    array = np.array([[[1, 1, 1], [2, 2, 2]]], np.uint8)
    assert enlarge(array, 2)[:, :, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
