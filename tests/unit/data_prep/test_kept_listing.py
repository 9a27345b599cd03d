"""The listing in a store: made once, believed while nothing changed, made anew when something did."""

import gzip
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from data_prep import kept as kept_module
from data_prep.job import TokenizeConfig, open_source
from data_prep.kept import LISTING, KeptListing
from mvar.errors import ImageError, WriteError
from mvar.images.sources import ImageFolder, look_into
from mvar.run.claims import Claims
from tests.stores import image_folder
from tests.unit.images.test_layouts import samples, write_tar


def long_ago(root):
    """Let nothing under `root` have changed within the last hour."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - 3600,) * 2)
    return root


@pytest.fixture
def images(tmp_path):
    return long_ago(image_folder(tmp_path / "images"))


@pytest.fixture
def looks(monkeypatch):
    """Counts looks into sources."""
    counted = []

    def count(*arguments):
        counted.append(arguments)
        return look_into(*arguments)

    monkeypatch.setattr("mvar.images.layouts.look_into", count)
    return counted


def config(images, **more):
    return TokenizeConfig(source=str(images), tokenizer="t", store=images.parent / "codes", **more)


def opened(images, keep=True, **more):
    return open_source(config(images, **more), keep=keep)


def same(left, right):
    return (left.fingerprint, left.splits, left.classes, left.notes) == (
        *(right.fingerprint, right.splits, right.classes, right.notes),
    )


def test_the_second_task_takes_the_listing_of_the_first(images, looks):
    (images / "class0/notes.txt").write_text("no picture")
    long_ago(images)
    first = opened(images, val_fraction=0.3)
    assert first.notes and same(first, opened(images, val_fraction=0.3))
    assert same(first, ImageFolder(images, val_fraction=0.3))
    assert len(opened(images).splits["val"]) == 0  # How images are split and read is not part of the listing.
    assert len(looks) == 1
    assert opened(images).reader(first.items[0].path, first.items[0].bytes).mode == "RGB"


def test_a_listing_is_the_same_bytes_whoever_makes_it(images):
    opened(images)
    before = (images.parent / "codes" / LISTING).read_bytes()
    shutil.rmtree(images.parent / "codes")
    opened(images)
    assert (images.parent / "codes" / LISTING).read_bytes() == before


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "class", "linked"])
def test_a_changed_source_is_listed_anew(images, looks, change):
    if change == "linked":
        image_folder(images.parent / "elsewhere", classes=1)
        (images / "class1/more").symlink_to(images.parent / "elsewhere/class0")
        long_ago(images.parent / "elsewhere")
        long_ago(images)
    before = opened(images)
    if change == "added":
        shutil.copy(images / "class0/1.png", images / "class0/new.png")
    elif change == "removed":
        (images / "class2/3.png").unlink()
    elif change == "renamed":
        (images / "class2/3.png").rename(images / "class2/33.png")
    elif change == "class":
        shutil.copytree(images / "class0", images / "class9")
    else:
        (images.parent / "elsewhere/class0/1.png").unlink()
    after = opened(images)
    assert len(looks) == 2
    assert after.fingerprint != before.fingerprint
    assert same(after, ImageFolder(images))


def test_a_touched_source_with_the_same_images_is_kept_anew(images, looks):
    opened(images)
    os.utime(images / "class1", (time.time() - 1800,) * 2)
    opened(images)
    opened(images)
    assert len(looks) == 2


def test_changes_of_a_moment_ago_are_not_believed(images, looks):
    os.utime(images / "class1")  # Another change now could have the same time.
    opened(images)
    opened(images)
    assert len(looks) == 2


def test_a_folder_whose_time_of_change_is_unknown_is_listed_every_time(images, looks):
    os.utime(images / "class1", (0, 0))
    opened(images)
    opened(images)
    assert len(looks) == 2


def test_a_file_replaced_in_its_place_is_noticed_when_it_is_read(images):
    opened(images)
    item = opened(images).items[0]
    Image.new("RGB", (100, 100)).save(item.path)
    source = opened(images)
    with pytest.raises(ImageError, match="when the images were listed"):
        source.reader(item.path, item.bytes)


def test_another_source_or_other_labels_are_another_listing(images, looks, tmp_path):
    opened(images)
    other = long_ago(shutil.copytree(images, tmp_path / "other"))
    assert opened(other).items[0].path.startswith(str(other))
    assert len(looks) == 2


@pytest.mark.parametrize("damage", ["empty", "torn", "no gzip", "another format", "no entries"])
def test_a_damaged_listing_is_made_anew(images, looks, damage):
    opened(images)
    path = images.parent / "codes" / LISTING
    data = path.read_bytes()
    text = gzip.decompress(data).decode()
    damaged = {
        "empty": b"",
        "torn": data[: len(data) // 2],
        "no gzip": b"hello",
        "another format": gzip.compress(text.replace('"format": 1', '"format": 2').encode()),
        "no entries": gzip.compress(text.splitlines()[0].encode() + b"\n{}"),
    }
    path.write_bytes(damaged[damage])
    source = opened(images)
    assert len(looks) == 2
    assert same(source, ImageFolder(images))


def test_of_tasks_that_start_together_one_lists_and_the_others_wait(images, monkeypatch):
    monkeypatch.setattr(kept_module, "POLL_S", 0.01)
    counted, found, together = [], [], threading.Barrier(4)

    def look():
        counted.append(1)
        time.sleep(0.2)
        return look_into(images)

    def task():
        listing = KeptListing(images.parent / "codes", {"source": "x"})
        together.wait()
        found.append(listing.once(look, keep=lambda contents: True))

    tasks = [threading.Thread(target=task) for _ in range(4)]
    for thread in tasks:
        thread.start()
    for thread in tasks:
        thread.join()
    assert len(counted) == 1
    assert len(found) == 4 and all(contents == found[0] for contents in found)
    assert [path.name for path in (images.parent / "codes").iterdir()] == [LISTING]


def test_a_task_whose_look_fails_lets_the_others_look(images):
    with pytest.raises(ImageError, match="nowhere"):
        opened(images.parent / "nowhere")
    assert opened(images).items


def test_without_claims_every_task_lists(images, looks, monkeypatch):
    def refuse(self, name):
        raise WriteError("a claim cannot be written")

    monkeypatch.setattr(Claims, "take", refuse)
    assert same(opened(images), ImageFolder(images))
    opened(images)
    assert len(looks) == 1


def test_looking_at_a_store_writes_nothing(images, looks):
    assert same(opened(images, keep=False), ImageFolder(images))
    assert not (images.parent / "codes").exists()
    opened(images)
    opened(images, keep=False)
    assert len(looks) == 2


def test_tars_and_lists_are_kept_too(images, tmp_path):
    tar = write_tar(tmp_path / "tars/x.tar", samples(0, 6))
    (tmp_path / "x.csv").write_text("images/class0/1.png,cat\nimages/class1/1.png,dog\n")
    for path in (tar, tmp_path / "x.csv"):
        os.utime(path, (time.time() - 3600,) * 2)
        first = opened(path)
        kept = KeptListing(path.parent / "codes", {})
        asked = gzip.decompress((path.parent / "codes" / LISTING).read_bytes())
        assert same(first, opened(path))
        assert first.reader(first.items[0].path, first.items[0].bytes).mode == "RGB"
        assert str(path).encode() in asked
        assert kept.read() is None  # Nobody asked for nothing.
        os.utime(path)
        assert same(first, opened(path))
    assert Path(tmp_path / "codes" / LISTING).exists()
