"""Damaged pictures in a tokenizer's training: what stands in for them, and how many may be left out."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mvar.errors import ConfigError, ImageError
from mvar.images.pixels import DamagedImageError
from mvar.run.world import World
from mvar.testing.ranks import run_ranks
from mvar.tokenizer.training.left_out import LeftOut, read_left_out, write_left_out
from mvar.tokenizer.training.pictures import Pictures, centre_views
from tests.unit.tokenizer.training.test_trainer import Gradients, tiny_config


class Damaged(Gradients):
    """Gradients, some of which are damaged."""

    def __init__(self, count=13, damaged=(3, 4, 12)):
        super().__init__(count)
        self.damaged = {str(number) for number in damaged}

    def reader(self, path):
        if path in self.damaged:
            raise DamagedImageError(f"image {path}: cannot be decoded (torn).", "torn")
        return Gradients.reader(path)


def stream(source, left_out, steps=7, first=0, **options):
    pictures = Pictures(source, 8, 1.0, 4, seed=3, left_out=left_out, **options)
    with ThreadPoolExecutor(3) as pool:
        return np.concatenate([pictures.batch(step, pool) for step in range(first, steps)])


def test_the_next_whole_picture_takes_the_place_of_a_damaged_one():
    left_out = LeftOut(3)
    found = stream(Damaged(), left_out)
    assert left_out.reasons == {"3": "torn", "4": "torn", "12": "torn"}
    whole = stream(Gradients(13), LeftOut())
    assert found.shape == whole.shape
    differing = sum(not np.array_equal(ours, theirs) for ours, theirs in zip(found, whole, strict=True))
    assert 0 < differing <= 3 * 3  # Of 28 pictures: two epochs of thirteen, of which three are damaged, and two more.
    items = Gradients(13).splits["train"]
    centre = centre_views(Damaged(), items, [3, 12, 5], 8, 1.0, LeftOut(3))
    expected = centre_views(Gradients(13), items, [5, 0, 5], 8, 1.0, LeftOut())
    assert np.array_equal(centre, expected)


def test_what_stands_in_depends_on_nothing_that_went_before():
    fresh = stream(Damaged(), LeftOut(3), first=4)
    assert np.array_equal(stream(Damaged(), LeftOut(3))[16:], fresh)
    assert np.array_equal(stream(Damaged(), LeftOut(3, {"4": "torn"}), first=4, ram_gib=0), fresh)


def test_more_damaged_pictures_than_allowed_are_an_error_that_names_them():
    with pytest.raises(DamagedImageError, match=r"image \d+: cannot be decoded"):
        stream(Damaged(), LeftOut())
    with pytest.raises(ImageError, match=r"3 pictures are damaged, skip_bad=2 allows fewer:\n  12 \(torn\)\n  3 "):
        stream(Damaged(), LeftOut(2))
    with pytest.raises(ImageError, match="all 2 pictures of a split are damaged"):
        stream(Damaged(2, (0, 1)), LeftOut(5))


def test_a_picture_that_cannot_be_read_is_never_left_out():
    class Unreadable(Gradients):
        @staticmethod
        def reader(path):
            raise ImageError(f"image {path}: cannot be read (Input/output error).")

    with pytest.raises(ImageError, match="cannot be read"):
        stream(Unreadable(), LeftOut(100))


def agree(world: World) -> dict[str, object]:
    left_out = LeftOut(2, {"a": "known"})
    before = left_out.excess() is None
    with_own = LeftOut(2, {"a": "known"})
    with_own.reasons |= {"b": "torn"} if world.rank == 0 else {"c": "torn"}
    unshared = with_own.unshared
    new = with_own.agree(world)
    return {
        "before": before,
        "unshared": unshared,
        "new": new,
        "after": with_own.unshared,
        "excess": str(with_own.excess()),
    }


def test_ranks_put_together_what_each_of_them_met(tmp_path):
    first, second = run_ranks(agree, 2, tmp_path)
    assert first == second
    assert (first["before"], first["unshared"], first["after"]) == (True, 1, 0)
    assert first["new"] == {"b": "torn", "c": "torn"}
    assert first["excess"].startswith("3 pictures are damaged, skip_bad=2")


def test_what_was_left_out_is_kept_as_long_as_it_is_in_the_source(tmp_path):
    path = tmp_path / "left-out.json"
    assert read_left_out(path, Damaged()) == {}
    write_left_out(path, {"3": "torn", "gone": "torn"})
    assert read_left_out(path, Damaged()) == {"3": "torn"}
    path.write_text("[")
    with pytest.raises(ConfigError, match=r"left-out\.json: cannot be read"):
        read_left_out(path, Damaged())


def test_states_from_before_belong_to_the_same_training():
    config = tiny_config()
    later = ("orientation", "grey_bits", "skip_bad", "other_images")
    assert not any(key in config.identity() for key in later)
    assert tiny_config(skip_bad=3, other_images=True).identity() == config.identity()
    turned = tiny_config(orientation="exif", grey_bits=12).identity()
    assert turned == config.identity() | {"orientation": "exif", "grey_bits": 12}
