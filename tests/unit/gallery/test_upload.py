"""What was painted on a page is the picture and the mask that `mvar edit` reads."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from mvar.cli import main as mvar
from mvar.errors import ConfigError
from mvar.gallery.entries import Exhibit
from mvar.gallery.show import given
from mvar.gallery.studio import Studio
from mvar.gallery.upload import canvas_of, pictures_of
from mvar.gallery.wish import HowFields, edit_command_line, edit_wish_of
from mvar.sampling.packing import encode_png
from mvar.testing.tiny_pairs import CLASSES, PYRAMID, SIDE_PX, write_pair


def painted(side_px: int = 2 * SIDE_PX) -> dict[str, object]:
    """A noisy picture, its right half painted over."""
    noise = np.random.default_rng(3).integers(0, 256, (side_px, side_px, 4), np.uint8)
    noise[..., 3] = 255
    layer = np.zeros_like(noise)
    layer[:, side_px // 2 :, 3] = 200
    return {"background": noise, "layers": [layer], "composite": noise}


@pytest.mark.parametrize("label", ["", "2"])
def test_an_edit_is_what_the_shown_command_writes_byte_for_byte(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, _, tokenizer = write_pair(tmp_path)
    exhibit, how = Exhibit("a model", Path(weights), Path(tokenizer)), HowFields(cfg="2", top_k="20")
    wish = edit_wish_of(label, 2, 7, how, CLASSES, None)
    picture, mask = pictures_of(painted())
    studio = Studio(torch.device("cpu"))
    frames = list(studio.edited(exhibit, canvas_of(picture, mask, SIDE_PX), wish))
    assert [frame.scale for frame in frames] == list(range(len(PYRAMID)))
    assert np.array_equal(frames[0].images_BHWC[0, :, :2], frames[-1].images_BHWC[1, :, :2])  # Known all along.
    assert not np.array_equal(frames[0].images_BHWC[0], frames[-1].images_BHWC[0])
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(picture)
    Path("mask.png").write_bytes(mask)
    command = shlex.split(edit_command_line(exhibit, wish, how, CLASSES))
    assert mvar([*command[1:], "--device", "cpu"]) == 0
    for number, image in enumerate(frames[-1].images_BHWC):
        assert Path("edited", f"{number:05d}.png").read_bytes() == encode_png(image)


def test_what_is_painted_is_white_in_the_mask_and_both_files_are_given() -> None:
    picture, mask = pictures_of(painted())
    canvas = canvas_of(picture, mask, 2 * SIDE_PX)
    assert canvas.redrawn_HW[:, SIDE_PX:].all() and not canvas.redrawn_HW[:, :SIDE_PX].any()
    assert np.array_equal(canvas.picture_HWC, np.asarray(painted()["background"])[..., :3])
    assert 'download="picture.png"' in given(picture, mask) and 'download="mask.png"' in given(picture, mask)


def test_what_is_missing_is_named() -> None:
    empty = np.zeros((8, 8, 4), np.uint8)
    for nothing in (None, {"background": None}, {"background": empty, "layers": []}):
        with pytest.raises(ConfigError, match="no picture yet"):
            pictures_of(nothing)
    with pytest.raises(ConfigError, match="nothing is marked"):
        pictures_of(painted() | {"layers": [np.zeros((2 * SIDE_PX, 2 * SIDE_PX, 4), np.uint8)]})


def test_a_class_that_is_not_there_or_more_than_one_is_refused() -> None:
    assert edit_wish_of(" ", 1, 0, HowFields(), CLASSES, None).counts == {CLASSES: 1}
    with pytest.raises(ConfigError, match="expected one class, or none"):
        edit_wish_of("0-1", 1, 0, HowFields(), CLASSES, None)
    with pytest.raises(ConfigError, match="not within"):
        edit_wish_of("9", 1, 0, HowFields(), CLASSES, None)
