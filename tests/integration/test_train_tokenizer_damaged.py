"""A tokenizer's training that meets a damaged picture goes on: by leaving it out, or after it was removed."""

import json
from pathlib import Path

import numpy as np
import pytest

from mvar.images.sources import ImageFolder
from mvar.randomness import permuted
from mvar.testing.ranks import Ranks
from mvar.tokenizer.files import sha256_of
from tests.integration.test_train_tokenizer import SETTINGS, STEPS, losses, run
from tests.tiny_tokenizers import write_pictures

MET_AT = 4
"""Steps before the one in which the damaged training picture is met; a step has four pictures."""
EVERY_STEP = ("save_every=1", "validate_every=0")


@pytest.fixture
def damaged(tmp_path):
    """A folder of pictures, of which a training one is damaged; its path."""
    folder = write_pictures(tmp_path / "images", side=10)
    items = ImageFolder(folder, val_fraction=0.2).items
    place = permuted(0, 0, np.array([4 * MET_AT + 1]), len(items))[0]
    return folder, tear(items[place])


def tear(item):
    path = Path(item.path)
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_leaving_pictures_out_resumes_a_training_that_met_them(damaged, tmp_path, capsys):
    folder, path = damaged
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(folder, out, *EVERY_STEP) == 2
    assert f"{path}: cannot be decoded" in capsys.readouterr().err
    assert list(losses(out)) == list(range(1, MET_AT + 1))
    assert run(folder, out, *EVERY_STEP, "skip_bad=1") == 0
    assert f"left out {path}: " in capsys.readouterr().err
    assert json.loads((out / "left-out.json").read_text()).keys() == {str(path)}
    assert run(folder, whole, "skip_bad=1") == 0
    assert losses(out) == losses(whole)
    for name in ("tokenizer.safetensors", "state.safetensors"):
        assert sha256_of(out / name) == sha256_of(whole / name), name


def test_more_damaged_pictures_than_allowed_end_the_training_with_its_state_saved(damaged, tmp_path, capsys):
    folder, path = damaged
    held_out = tear(ImageFolder(folder, val_fraction=0.2).splits["val"][0])
    assert run(folder, tmp_path / "out", "skip_bad=1") == 2
    message = capsys.readouterr().err
    assert "2 pictures are damaged, skip_bad=1 allows fewer" in message
    assert str(path) in message and str(held_out) in message
    assert run(folder, tmp_path / "out", "skip_bad=2", "steps=8") == 2
    assert "steps: 40 then, 8 now" in capsys.readouterr().err  # There is a state to go on from.


def test_a_training_goes_on_after_its_damaged_picture_was_removed(damaged, tmp_path, capsys):
    folder, path = damaged
    out = tmp_path / "out"
    assert run(folder, out, *EVERY_STEP) == 2
    path.unlink()
    assert run(folder, out, *EVERY_STEP) == 2
    assert "other_images=true goes on" in capsys.readouterr().err
    assert run(folder, out, *EVERY_STEP, "other_images=true") == 0
    assert list(losses(out)) == list(range(1, STEPS + 1))
    assert run(folder, out, *EVERY_STEP) == 0  # From then on the images of now are the training's.


def test_two_processes_put_together_what_each_of_them_left_out(damaged, tmp_path):
    folder, path = damaged
    items = ImageFolder(folder, val_fraction=0.2).items
    places = permuted(0, 0, np.array([4 * MET_AT + 1, 4 * MET_AT + 2]), len(items))  # Of the first and second process.
    paths = [path, tear(items[places[1]])]
    words = [f"images={folder}", f"out={tmp_path / 'out'}", *SETTINGS, "save_every=1", "threads=1"]
    few = Ranks("mvar.testing.ranks:command", ["mvar.train_tokenizer", [*words, "skip_bad=1"]], 2, tmp_path / "few")
    assert few.wait() == [2, 2], few.output()
    assert "2 pictures are damaged, skip_bad=1 allows fewer" in few.output()
    enough = Ranks(
        "mvar.testing.ranks:command", ["mvar.train_tokenizer", [*words, "skip_bad=2"]], 2, tmp_path / "enough"
    )
    assert enough.wait() == [0, 0], enough.output()
    assert "resuming after step" in enough.output()
    assert json.loads((tmp_path / "out/left-out.json").read_text()).keys() == set(map(str, paths))
    assert list(losses(tmp_path / "out")) == list(range(1, STEPS + 1))
