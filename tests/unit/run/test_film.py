"""A run's grids as one film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from mvar.filmstrip import main as filmstrip
from mvar.images.arrays import save_png
from mvar.run.film import FILM, MOST_FRAMES, WIDTH_PX, write_film
from mvar.run.folder import RunFolder


def draw_grid(run: RunFolder, step: int, *, side: int = 12) -> NDArray[np.uint8]:
    frame = np.full((side, side, 3), step % 251, np.uint8)
    save_png(run.samples / f"step-{step:09d}.png", frame, sync=False)
    return frame


def frames(path: Path) -> list[int]:
    """A value of each frame, which is the same everywhere."""
    with Image.open(path) as film:
        pictures = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert all(picture.shape == (WIDTH_PX, WIDTH_PX, 3) and picture.std() == 0 for picture in pictures)
    return [int(picture[0, 0, 0]) for picture in pictures]


def test_grids_become_a_film_in_their_order_without_those_of_another_size(tmp_path: Path) -> None:
    run, film = RunFolder(tmp_path), tmp_path / "samples" / FILM
    assert not write_film(run, film) and not film.exists(), "there are none"
    draw_grid(run, 10)
    assert not write_film(run, film) and not film.exists(), "one is no film"
    draw_grid(run, 5, side=20)
    draw_grid(run, 200)
    draw_grid(run, 90)
    assert write_film(run, film)
    assert frames(film) == [10, 90, 200]


def test_a_long_training_becomes_a_film_of_bounded_length(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in range(1, 200):
        draw_grid(run, step)
    assert write_film(run, tmp_path / "film.webp")
    found = frames(tmp_path / "film.webp")
    assert len(found) == MOST_FRAMES and found == sorted(found) and (found[0], found[-1]) == (1, 199)


def test_the_command_makes_the_film_of_a_run_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for step in (1, 2):
        draw_grid(run, step)
    assert filmstrip(["--over", "samples", "--weights", str(run.path), "--out", str(tmp_path / "again")]) == 0
    assert frames(tmp_path / "again.webp") == [1, 2]
