"""`mvar edit` and `mvar filmstrip` as a user runs them: what lies in the folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mvar.cli import main as mvar
from mvar.images.arrays import from_uint8, to_uint8
from mvar.testing.tiny_pairs import PYRAMID, SIDE_PX, write_pair
from mvar.tokenizer.files import load_tokenizer


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the weights and the tokenizer."""
    return write_pair(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "in.png"
    values = np.random.default_rng(0).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def run(command: str, places: list[str], *options: object) -> int:
    return mvar([command, *places, "--device", "cpu", "--top-k", "0", *map(str, options)])


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_part_is_redrawn_and_the_same_command_gives_the_same_bytes(
    places: list[str], image: Path, tmp_path: Path
) -> None:
    out, again, more = tmp_path / "out", tmp_path / "again", tmp_path / "more"
    asked = ("--image", image, "--box", "4,0,4,8", "--class", 2, "--keep", "pixels", "--edge", 1)
    assert run("edit", places, *asked, "--num", 2, "--out", out) == 0
    assert list(content(out)) == ["00000.png", "00001.png", "edit.json", "sheet.png"]
    drawn = [pixels(out / f"0000{number}.png") for number in range(2)]
    for one in drawn:
        assert np.array_equal(one[:, :3], pixels(image)[:, :3]) and not np.array_equal(one[:, 4:], pixels(image)[:, 4:])
    assert not np.array_equal(drawn[0], drawn[1])
    assert run("edit", places, *asked, "--num", 2, "--out", again) == 0
    assert content(again) == content(out)
    assert run("edit", places, *asked, "--num", 3, "--out", more) == 0
    assert content(more)["00001.png"] == content(out)["00001.png"], "whatever else is drawn"
    record = json.loads((out / "edit.json").read_text())
    assert record["class"] == 2 and record["edit"]["keep"] == "pixels" and len(record["seeds"]) == 2
    assert run("edit", places, *asked, "--num", 1, "--out", out) == 0
    assert list(content(out)) == ["00000.png", "edit.json", "sheet.png"], "replaced as a whole"


def test_a_mask_is_a_box_by_another_name_and_the_known_part_is_the_reconstruction(
    places: list[str], image: Path, tmp_path: Path
) -> None:
    marked = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    marked[:, 4:] = 255
    Image.fromarray(marked).save(tmp_path / "mask.png")
    assert run("edit", places, "--image", image, "--mask", tmp_path / "mask.png", "--out", tmp_path / "mask") == 0
    assert run("edit", places, "--image", image, "--box", "4,0,4,8", "--out", tmp_path / "box") == 0
    assert content(tmp_path / "mask") == content(tmp_path / "box")
    assert run("edit", places, "--image", image, "--place", "0,0,4,8", "--out", tmp_path / "placed") == 0
    squeezed = np.asarray(Image.open(image).resize((4, 8), Image.Resampling.LANCZOS))
    sheet = pixels(tmp_path / "placed/sheet.png")[::12, ::12]
    assert np.array_equal(sheet[:, :4], squeezed)
    assert np.array_equal(pixels(tmp_path / "placed/00000.png")[:, :3], sheet[:, 10:13]), "the reconstruction"


def test_detail_is_redrawn_on_the_layout_that_is_kept(places: list[str], image: Path, tmp_path: Path) -> None:
    assert run("edit", places, "--image", image, "--vary", 2, "--class", 1, "--num", 2, "--out", tmp_path / "vary") == 0
    tokenizer = load_tokenizer(Path(places[3]))
    whole = to_uint8(tokenizer.decode(tokenizer.encode(from_uint8(pixels(image)[None].copy()))))[0]
    assert np.array_equal(pixels(tmp_path / "vary/sheet.png")[::12, 10 * 12 :: 12][:, :8], whole)
    drawn = [pixels(tmp_path / f"vary/0000{number}.png") for number in range(2)]
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_morph_begins_and_ends_with_plain_samples(places: list[str], tmp_path: Path) -> None:
    out, plain = tmp_path / "morph", tmp_path / "plain"
    assert run("edit", places, "--morph", "1,3", "--steps", 4, "--num", 2, "--out", out) == 0
    names = [f"0000{number}-0{step}.png" for number in range(2) for step in range(4)]
    assert list(content(out)) == [*names, "edit.json", "morph.webp", "sheet.png"]
    assert run("sample", places, "--classes", 1, "--per-class", 2, "--batch", 1, "--out", plain) == 0
    for number in range(2):
        first = pixels(plain / f"0001/0000{number}.png")
        assert np.array_equal(pixels(out / f"0000{number}-00.png"), first)
        assert not np.array_equal(pixels(out / f"0000{number}-03.png"), first)
    with Image.open(out / "morph.webp") as film:
        assert getattr(film, "n_frames", 1) == 4 + 2, "there and back"
    assert pixels(out / "sheet.png").shape == (2 * 96 + 24, 4 * 96 + 3 * 24, 3)


def test_a_strip_over_scales_ends_with_what_is_sampled(places: list[str], tmp_path: Path) -> None:
    assert run("filmstrip", places, "--over", "scales", "--classes", "0-2", "--out", tmp_path / "strip") == 0
    assert run("sample", places, "--classes", "0-2", "--per-class", 1, "--out", tmp_path / "plain") == 0
    factor, apart = 8, SIDE_PX + 2
    strip = pixels(tmp_path / "strip.png")[::factor, ::factor]
    assert strip.shape == (3 * apart - 2, len(PYRAMID) * apart - 2, 3)
    for row in range(3):
        shown = [strip[row * apart : row * apart + 8, scale * apart : scale * apart + 8] for scale in range(3)]
        assert np.array_equal(shown[-1], pixels(tmp_path / f"plain/000{row}/00000.png"))
        assert not np.array_equal(shown[0], shown[1])
    with Image.open(tmp_path / "strip.webp") as film:
        assert getattr(film, "n_frames", 1) == len(PYRAMID)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "IN"], "Give --mask, --box, --place or --vary"),
        (["--box", "0,0,4,4"], "Give --image"),
        (["--image", "IN", "--mask", "SMALL"], "Give a mask of the image's size"),
        (["--image", "IN", "--mask", "BLACK"], "mask: empty"),
        (["--image", "IN", "--mask", "WHITE"], "mask: full"),
        (["--image", "TEXT", "--box", "0,0,4,4"], "is no picture that can be read"),
        (["--image", "GONE", "--box", "0,0,4,4"], "cannot be read"),
        (["--image", "IN", "--box", "0,0,9,9"], "not an area of the image"),
        (["--image", "IN", "--vary", "3"], "vary 3"),
        (["--image", "IN", "--vary", "0"], "vary 0"),
        (["--image", "IN", "--box", "0,0,4,4", "--class", "4"], "not within 0-3"),
        (["--image", "IN", "--box", "0,0,4,4", "--class", "0,1"], "expected one class"),
        (["--morph", "1"], "expected two different classes"),
        (["--morph", "1,2", "--class", "1"], "Leave --class out"),
        (["--morph", "1,2", "--steps", "1"], "two frames"),
    ],
)
def test_bad_requests_are_one_message_and_leave_nothing(
    places: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "SMALL.png")
    Image.new("L", (SIDE_PX, SIDE_PX)).save(tmp_path / "BLACK.png")
    Image.new("L", (SIDE_PX, SIDE_PX), 255).save(tmp_path / "WHITE.png")
    (tmp_path / "TEXT.png").write_text("no picture")
    named = [
        str(image) if word == "IN" else str(tmp_path / f"{word}.png") if word.isupper() else word for word in options
    ]
    assert run("edit", places, *named, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("mvar: error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_not_replaced(
    places: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("edit", places, "--image", image, "--box", "0,0,4,4", "--out", tmp_path) == 2
    assert "holds no edit" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--over", "checkpoints"], "no run folder with checkpoints"),
        (["--over", "checkpoints", "--steps", "5"], "the run's checkpoints are none"),
        (["--over", "scales", "--steps", "5"], "--over checkpoints"),
        (["--over", "scales", "--classes", "7"], "not within 0-3"),
        (["--over", "scales", "--per-class", "17"], "68 pictures"),
        (["--over", "samples"], "no two grids"),
    ],
)
def test_strips_that_cannot_be_are_refused(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run("filmstrip", places, *options, "--out", tmp_path / "strip") == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
