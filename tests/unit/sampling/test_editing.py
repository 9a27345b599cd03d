"""A picture redrawn in part: what of it is kept to the byte, what is hidden, and which requests are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mvar
from mvar.errors import ConfigError, ImageError
from mvar.images.arrays import from_uint8, to_uint8
from mvar.sampling.canvas import Area, Canvas, Redrawn
from mvar.sampling.editing import EditOptions, drawn_share, edit, hidden
from mvar.sampling.forcing import Across
from mvar.sampling.options import SamplingOptions
from tests.unit.sampling.test_graph import pair

OPTIONS = SamplingOptions(cfg=1.5, top_k=8)
LABELS = torch.tensor([2, 0, 1])


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)


def right(columns: int = 2) -> Redrawn:
    redrawn_HW = np.zeros((6, 6), bool)
    redrawn_HW[:, 6 - columns :] = True
    return redrawn_HW


def test_the_known_part_is_the_reconstruction_beyond_the_edge() -> None:
    model, tokenizer = pair()
    shown = hidden(from_uint8(picture()[None]), torch.from_numpy(right()))
    reconstruction = to_uint8(tokenizer.decode(tokenizer.encode(shown)))[0]
    edited = mvar.edit(model, tokenizer, picture(), right(), LABELS, OPTIONS, how=EditOptions(edge_px=1))
    assert edited.shape == (3, 6, 6, 3)
    for one in edited:
        assert np.array_equal(one[:, :3], reconstruction[:, :3])
        assert not np.array_equal(one[:, 4:], reconstruction[:, 4:])
    assert len({one.tobytes() for one in edited}) == 3
    raw = edit(model, tokenizer, picture(), right(), LABELS, OPTIONS, how=EditOptions(keep="nothing"))
    assert np.array_equal(raw[:, :, 4:], edited[:, :, 4:]), "the redrawn part is as it was decoded"
    own = edit(model, tokenizer, picture(), right(), LABELS, OPTIONS, how=EditOptions(keep="pixels", edge_px=0))
    assert np.array_equal(own[0, :, :4], picture()[:, :4])


@pytest.mark.parametrize("across", ["drawn", "given"])
def test_nothing_of_what_is_hidden_is_in_the_result(across: Across) -> None:
    model, tokenizer = pair()
    other = picture()
    other[:, 4:] = 255 - other[:, 4:]
    how = EditOptions(across=across)
    both = [edit(model, tokenizer, one, right(), LABELS, OPTIONS, how=how) for one in (picture(), other)]
    assert np.array_equal(both[0], both[1])
    varied = [
        edit(model, tokenizer, one, right(), LABELS, OPTIONS, how=EditOptions(vary=1)) for one in (picture(), other)
    ]
    assert not np.array_equal(varied[0], varied[1]), "its coarse scales are kept"


def test_seeds_are_those_of_sampling() -> None:
    model, tokenizer = pair()
    draw = lambda seeds: edit(model, tokenizer, picture(), right(), LABELS, OPTIONS, seeds)  # noqa: E731
    assert np.array_equal(draw([5, 6, 7]), draw([5, 6, 7]))
    assert not np.array_equal(draw([5, 6, 7])[0], draw([4, 6, 7])[0])
    assert np.array_equal(draw([5, 6, 7])[1:], draw([4, 6, 7])[1:])


def test_hidden_pixels_are_painted_over_from_the_edge() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[..., :4] = 0.5
    redrawn = torch.zeros(8, 8, dtype=torch.bool)
    redrawn[:, 4:] = True
    torch.testing.assert_close(hidden(images, redrawn), torch.full((1, 3, 8, 8), 0.5))
    assert torch.equal(hidden(images, ~(redrawn | True)), images)


def test_the_edge_goes_over_evenly() -> None:
    redrawn = torch.zeros(1, 8, dtype=torch.bool)
    redrawn[0, 6:] = True
    assert drawn_share(redrawn, 3)[0].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    ("redrawn", "how", "message"),
    [
        (np.zeros((6, 6), bool), EditOptions(), "mask: empty"),
        (np.ones((6, 6), bool), EditOptions(), "mask: full"),
        (right(5), EditOptions(), "mask: full, or nearly: no cell of 2 x 2"),
        (right(), EditOptions(vary=3), "vary 3: .* are 1 to 2"),
        (right(), EditOptions(vary=0), "vary 0: .* are 1 to 2"),
        (np.zeros((6, 5), bool), EditOptions(), "this tokenizer takes 6 px pictures"),
    ],
)
def test_requests_that_make_no_sense_are_refused(redrawn: Redrawn, how: EditOptions, message: str) -> None:
    model, tokenizer = pair()
    with pytest.raises(ConfigError, match=message):
        edit(model, tokenizer, picture(), redrawn, LABELS, OPTIONS, how=how)


@pytest.mark.parametrize("wrong", [{"forcing": "no"}, {"across": "no"}, {"keep": "no"}, {"edge_px": -1}])
def test_options_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).removesuffix("_px")):
        EditOptions(**wrong)  # type: ignore[arg-type]


# ---- from files


def save(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def test_picture_and_mask_go_the_same_way(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:10, 10:20] = 255  # The upper left quarter of the centre square.
    image = save(tmp_path / "a.png", wide)
    for canvas in (
        Canvas.of(image, 10, mask=save(tmp_path / "mask.png", wide)),
        Canvas.of(image, 10, box=Area.parse("--box", "10,0,10,10")),
    ):
        assert np.array_equal(canvas.redrawn_HW, canvas.picture_HWC[..., 0] >= 128)
        assert canvas.redrawn_HW[:5, :5].all() and canvas.redrawn_HW.sum() == 25


def test_a_placed_picture_is_known_and_all_around_it_is_redrawn(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", np.full((9, 9, 3), 200, np.uint8))
    canvas = Canvas.of(image, 10, place=Area(2, 3, 4, 5))
    assert (~canvas.redrawn_HW[3:8, 2:6]).all() and (~canvas.redrawn_HW).sum() == 20
    assert (canvas.picture_HWC[3:8, 2:6] == 200).all()
    hole = Canvas.of(image, 10, place=Area(0, 0, 9, 9), box=Area(0, 0, 3, 9))
    assert hole.redrawn_HW[:, :3].all() and not hole.redrawn_HW[:9, 3:9].any()


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "1,2,3,-4", "1.5,2,3,4"])
def test_an_area_is_four_whole_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="expected x,y,w,h"):
        Area.parse("--box", text)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png", np.zeros((9, 9, 3), np.uint8))
    small = save(tmp_path / "b.png", np.zeros((8, 9, 3), np.uint8))
    text = tmp_path / "c.png"
    text.write_text("no picture")
    with pytest.raises(ConfigError, match="9 x 8 pixels, and the image 9 x 9"):
        Canvas.of(image, 10, mask=small)
    with pytest.raises(ConfigError, match="not an area of the image, which has 9 x 9"):
        Canvas.of(image, 10, box=Area(5, 5, 5, 5))
    with pytest.raises(ConfigError, match="not an area of the canvas, which has 10 x 10"):
        Canvas.of(image, 10, place=Area(0, 0, 0, 5))
    with pytest.raises(ImageError, match=r"--image .*c\.png: is no picture that can be read"):
        Canvas.of(text, 10)
    with pytest.raises(ImageError, match=r"--mask .*c\.png: is no picture that can be read"):
        Canvas.of(image, 10, mask=text)
