"""List files and webdataset tars as sources, and which kind a path is taken for."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from mvar.errors import ConfigError, ImageError, StoreError
from mvar.images.layouts import detect, open_images
from mvar.images.pixels import DamagedImageError


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), color).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count, classes=3):
    """Members of `count` samples whose red is their number and whose class is number mod classes."""
    for number in range(first, first + count):
        yield f"dir/{number:04d}.png", png((number, 0, 9))
        yield f"dir/{number:04d}.cls", str(number % classes).encode()


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png", "dog/with, comma.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((number, 0, 9)))
    return tmp_path


def red(source, item):
    return source.reader(item.path).getpixel((0, 0))[0]


# ---- list files


def test_a_list_file_names_images_classes_and_splits(images):
    lines = 'path,label,split\nimages/dog/1.png,dog\nimages/cat/1.png,cat,train\n"images/dog/with, comma.png",dog,val\n'
    (images / "list.csv").write_text(lines)
    source = open_images(str(images / "list.csv"))
    assert source.classes == ("cat", "dog")
    assert [(item.key, item.label) for item in source.splits["train"]] == [("images/cat/1", 0), ("images/dog/1", 1)]
    assert [red(source, item) for split in ("train", "val") for item in source.splits[split]] == [0, 2, 3]
    assert source.fingerprint.kind == "list"


def test_number_labels_are_class_indices_that_names_may_be_given_for(images):
    path = images / "list.txt"
    path.write_text(f"images/cat/1.png,10\n{images}/images/dog/1.png,2\n")
    names = images / "names"
    names.write_text("".join(f"class {label}\n" for label in range(11)))
    source = open_images(str(path), class_names=names)
    assert source.classes[10] == "class 10"
    assert sorted(item.label for item in source.splits["train"]) == [2, 10]
    names.write_text("one\ntwo\n")
    with pytest.raises(ImageError, match="labels up to 10, but only 2 class names"):
        open_images(str(path), class_names=names)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("images/cat/1.png\n", "line 1: expected `path,label`"),
        ("images/cat/1.png,cat,test\n", "line 1: expected .*train"),
        ("images/cat/1.png,cat\nimages/cat/9.png,cat\n", r"line 2: image .*9\.png cannot be read"),
        ("images/cat/1.png,cat\nimages/cat/1.png,dog\n", "two images share the key"),
        ("images/cat/1.png,cat\nimages/cat/../cat/1.png,cat\n", "two images share the key"),
        ("path,label\n", "no images"),
    ],
)
def test_a_list_file_that_cannot_be_used_is_refused_by_line(images, lines, message):
    (images / "list.csv").write_text(lines)
    with pytest.raises(ImageError, match=message):
        open_images(str(images / "list.csv"))


# ---- tars


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "tars/set-train-0.tar", samples(0, 5))
    write_tar(tmp_path / "tars/set-train-1.tar", samples(5, 4))
    write_tar(tmp_path / "tars/set-validation-0.tar", samples(0, 3))
    return tmp_path / "tars"


def test_tars_list_their_samples_and_give_their_pictures(tars):
    source = open_images(str(tars))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 9, "val": 3}
    assert source.classes == ("0", "1", "2")
    for split in ("train", "val"):
        assert all(red(source, item) == int(item.key[-4:]) for item in source.splits[split])
        assert all(item.label == int(item.key[-4:]) % 3 for item in source.splits[split])
    assert source.splits["train"][0].key == "set-train-0/dir/0000"


def test_patterns_and_urls_list_as_the_folder_does(tars, tmp_path):
    expected = open_images(str(tars))
    local = open_images(f"{tars}/set-{{train-{{0..1}},validation-0}}.tar")
    url = f"pipe:cat {tars}/set-{{train-{{0..1}},validation-0}}.tar"
    remote = open_images(url, cache=tmp_path / "cache")
    assert local.fingerprint == remote.fingerprint == expected.fingerprint
    item = remote.splits["val"][2]
    assert np.array_equal(np.asarray(remote.reader(item.path))[0, 0], (2, 0, 9))
    for path in tars.iterdir():
        path.unlink()
    assert open_images(url, cache=tmp_path / "cache").fingerprint == expected.fingerprint  # From the copies.


def test_a_url_without_a_cache_or_that_fails_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ImageError, match="source_cache=FOLDER"):
        open_images("https://nowhere.invalid/train-{0..3}.tar")
    with pytest.raises(StoreError, match="cannot be fetched"):
        open_images("pipe:head -c 100000 /dev/zero; false x.tar", kind="tars", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_truncated_tar_is_refused(tars):
    data = (tars / "set-train-1.tar").read_bytes()
    a_sample = 4 * 512  # Two headers, a picture and a label of less than a block.
    for kept in (100, 512 + 20, len(data) // 2, 2 * a_sample):
        (tars / "set-train-1.tar").write_bytes(data[:kept])
        with pytest.raises(ImageError, match=r"set-train-1"):
            open_images(str(tars))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png((1, 1, 1)))], r"sample a has no \.cls"),
        ([("a.png", png((1, 1, 1))), ("a.cls", b"cat")], "holds b'cat', expected a class index"),
        ([("a.png", b""), ("a.jpg", b""), ("a.cls", b"1")], "sample a has two images"),
        ([("readme", b"nothing")], "no samples"),
    ],
)
def test_tars_without_pairs_of_image_and_class_are_refused(tmp_path, members, message):
    with pytest.raises(ImageError, match=message):
        open_images(str(write_tar(tmp_path / "x.tar", members)))


def test_a_damaged_picture_in_a_tar_is_named_by_its_place(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", png((1, 1, 1))[:40]), ("a.cls", b"0")])
    source = open_images(str(path))
    with pytest.raises(DamagedImageError, match=rf"image {path}@512\+40: cannot be decoded"):
        source.reader(source.splits["train"][0].path)


# ---- which kind


def test_the_kind_is_seen_from_name_and_content(tars, images):
    assert detect(str(images / "images")) == "folder"
    assert detect(str(tars)) == detect("https://x/y") == detect("a-{0..3}.tar") == detect("pipe:cat x") == "tars"
    assert detect("list.csv") == "list"
    os.mkdir(tars / "class0")
    assert detect(str(tars)) == "folder"


def test_options_without_meaning_for_the_kind_are_refused(tars, tmp_path):
    with pytest.raises(ConfigError, match="val_labels: has no meaning"):
        open_images(str(tars), val_labels=tmp_path / "val.txt")
