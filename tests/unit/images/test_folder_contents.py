"""What a folder of images is taken for, which files come in, and that nothing is left out without a word."""

import os
from pathlib import Path

import pytest
from PIL import Image

from data_prep.job import TokenizeConfig, plan_job
from mvar.errors import ImageError
from mvar.images.layouts import open_images
from mvar.images.sources import ImageFolder, misleading_numbers
from mvar.images.splits import role_in, role_of
from tests.stores import tiny_tokenizer, tiny_vqvae
from tests.unit.images.test_layouts import png, samples, write_tar


def put(root, *names, **options):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200, 30, 90)).save(root / name, **options)


def keys(source, split="train"):
    return [item.key for item in source.splits[split]]


# ---- splits


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[(name, "train") for name in ("train", "Training", "TRAIN", "train2017", "train_set", "train-images")],
        *[(name, "val") for name in ("val", "valid", "Validation", "VAL2017", "dev", "val_1")],
        *[(name, "test") for name in ("test", "Testing", "eval", "test set")],
        *[(name, None) for name in ("trainer", "train_station", "test_tube", "valley", "developer", "cat", "2017")],
    ],
)
def test_usual_names_of_splits_are_known_in_any_case(name, role):
    assert role_of(name) == role


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("train", "Validation"), ("Training", "VAL", "Eval")])
def test_splits_of_any_usual_name_are_splits(tmp_path, names):
    put(tmp_path, *(f"{name}/{kind}/1.png" for name in names for kind in ("cat", "dog")))
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert keys(source) == keys(source, "val") == ["cat/1", "dog/1"]
    assert any("test" in note or "Eval" in note for note in source.notes) == (len(names) == 3)


def test_folders_beside_the_splits_are_left_out_with_a_note_if_they_hold_no_image(tmp_path):
    put(tmp_path, "train/cat/1.png", "val/cat/2.png")
    (tmp_path / "annotations/a").mkdir(parents=True)
    (tmp_path / "annotations/a/1.xml").write_text("<a/>")
    source = ImageFolder(tmp_path)
    assert source.classes == ("cat",)
    assert any("annotations" in note for note in source.notes)
    put(tmp_path, "annotations/a/stray.png")
    with pytest.raises(ImageError, match="annotations holds images and lies beside train: a class, or a split"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/1.png", "val/a/1.png", "valid/a/1.png"), "val, valid are the same split"),
        (("train/a/1.png", "Train/a/1.png"), "Train, train are the same split"),
        (("train/1.png", "val/2.png"), "train, val is called like a split, but holds no class folders"),
        (("train/1.png", "val/a/2.png", "cat/1.png"), "train holds no class folders, but val beside it does"),
        (("cat/1.png", "dog/1.png", "val/cat/1.png"), "val is called like a split and holds folders"),
        (("train/steam/1.png", "plane/1.png"), "plane holds images and lies beside train"),
    ],
)
def test_a_layout_that_can_be_read_two_ways_is_refused_by_name(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(ImageError, match=f"{message}.*Rename or move it"):
        ImageFolder(tmp_path)


def test_classes_called_like_splits_are_noted(tmp_path):
    put(tmp_path, "train/1.png", "plane/2.png", "val/3.png")
    source = ImageFolder(tmp_path)
    assert source.classes == ("plane", "train", "val")
    assert [note.split()[1] for note in source.notes] == ["train", "val"]


@pytest.mark.parametrize(
    ("stem", "role"),
    [("x-train-0", "train"), ("x-Validation-0", "val"), ("VAL0", "val"), ("test-000", "test"), ("contest", "train")],
)
def test_tars_know_their_split_in_any_case(stem, role):
    assert role_in(stem) == role


def test_tars_for_tests_are_left_out_with_a_note_unless_there_are_no_others(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(0, 5))
    write_tar(tmp_path / "Val-0.tar", samples(0, 2))
    write_tar(tmp_path / "test-0.tar", samples(0, 4))
    source = open_images(str(tmp_path))
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 5, "val": 2}
    assert any("tar for tests" in note and "test-0.tar" in note for note in source.notes)
    assert len(open_images(str(tmp_path / "test-0.tar")).splits["train"]) == 4


def test_litter_does_not_hide_that_a_folder_holds_tars(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(0, 5))
    (tmp_path / "@eaDir").mkdir()
    (tmp_path / "._train-0.tar").write_bytes(b"x")
    assert len(open_images(str(tmp_path)).splits["train"]) == 5


def test_lists_know_the_usual_names_of_splits(tmp_path):
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "x.csv").write_text("1.png,cat,Training\n2.png,cat,validation\n")
    source = open_images(str(tmp_path / "x.csv"))
    assert (keys(source), keys(source, "val")) == (["1"], ["2"])


# ---- files


def test_whatever_pillow_opens_comes_in_and_the_rest_is_counted_and_named(tmp_path):
    put(tmp_path, "a/1.png")
    for name, kind in (("2.jfif", "JPEG"), ("3.jpe", "JPEG"), ("4", "PNG"), ("5.picture", "WEBP"), ("6.JPG_", "JPEG")):
        put(tmp_path, f"a/{name}", format=kind)
    put(tmp_path, "a/7.avif", format="PNG")  # Its content decides how it is read.
    (tmp_path / "a/notes.txt").write_text("PNG")
    (tmp_path / "a/more.txt").write_text("")
    (tmp_path / "a/README").write_text("P5 times")
    os.mkfifo(tmp_path / "a/pipe.png")
    source = ImageFolder(tmp_path)
    assert sorted(Path(item.path).name for item in source.items) == [
        *("1.png", "2.jfif", "3.jpe", "4", "5.picture", "6.JPG_", "7.avif"),
    ]
    assert all(source.read_rgb(item.path).size == (8, 8) for item in source.items)
    assert source.notes == (
        "left out, neither a file nor a folder: 1, such as a/pipe.png",
        "left out, no picture that Pillow opens (.txt): 2, such as a/more.txt",
        "left out, no picture that Pillow opens (no extension): 1, such as a/README",
    )


def test_litter_of_file_servers_stays_out_at_every_level(tmp_path):
    put(tmp_path, "a/1.png", "@eaDir/x/2.png", "a/@eaDir/3.png/SYNOPHOTO_THUMB.png", "#recycle/b/4.png")
    put(tmp_path, "__MACOSX/a/5.png", "a/.thumbnails/6.png", "a/._1.png", "lost+found/7.png")
    source = ImageFolder(tmp_path)
    assert source.classes == ("a",)
    assert keys(source) == ["a/1"]
    assert source.notes == ("left out, hidden, or of the system: 7, such as #recycle",)


def test_litter_in_tars_stays_out_and_what_else_is_left_out_is_noted(tmp_path):
    members = [("./k/a.png", png((1, 1, 1))), ("./k/a.cls", b"0"), ("./k/a.json", b"{}")]
    litter = [("./k/._a.png", b"x"), ("__MACOSX/k/a.png", b"x"), ("k/b.cls", b"0"), ("k/c.jfif", png((2, 2, 2)))]
    path = write_tar(tmp_path / "x.tar", [*members, *litter, ("k/c.cls", b"0")])
    source = open_images(str(path))
    assert [source.reader(item.path).getpixel((0, 0))[0] for item in source.splits["train"]] == [1, 2]
    assert [note.split(":")[0] for note in source.notes] == [
        "left out, a sample with a .cls and no picture",
        "left out, no picture by its name (.json)",
    ]


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    put(tmp_path / "images", "a/1.png", "b/2.png")
    put(tmp_path / "elsewhere", "3.png", "deep/4.png")
    (tmp_path / "images/a/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "images/a")
    (tmp_path / "elsewhere/root").symlink_to(tmp_path / "images")
    (tmp_path / "images/b/self").symlink_to("self")
    source = ImageFolder(tmp_path / "images")
    assert keys(source) == ["a/1", "a/linked/3", "a/linked/deep/4", "b/2"]
    assert source.notes == (
        "left out, a link to a folder that is listed already: 2, such as a/linked/root",
        "left out, a link to nothing: 1, such as b/self",
    )


def test_a_folder_with_two_names_in_a_class_is_listed_once_under_its_own(tmp_path):
    put(tmp_path, "a/z/1.png")
    (tmp_path / "a/b").symlink_to("z")
    assert keys(ImageFolder(tmp_path)) == ["a/z/1"]


def test_a_class_that_is_a_link_to_a_folder_above_is_refused(tmp_path):
    put(tmp_path, "a/1.png")
    (tmp_path / "b").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="/b: no images"):
        ImageFolder(tmp_path)


def test_loose_pictures_beside_the_class_folders_are_noted(tmp_path):
    put(tmp_path, "train/a/1.png", "train/2.png", "3.png")
    assert ImageFolder(tmp_path).notes == ("left out, pictures in no class folder: 2, such as 3.png",)


# ---- names


def test_names_that_are_no_utf8_are_listed_read_and_planned(tmp_path):
    raw = os.fsdecode(b"caf\xe9")
    put(tmp_path / "images", f"{raw}/1.png", f"b/{raw}.png", format="PNG")
    source = ImageFolder(tmp_path / "images")
    assert source.classes == ("b", "caf\\xe9")
    assert keys(source) == ["b/caf%E9", "caf%E9/1"]
    assert all(source.read_rgb(item.path).size == (8, 8) for item in source.items)
    (tmp_path / "x.csv").write_bytes(b"images/caf\xe9/1.png,caf\xe9\nimages/b/caf\xe9.png,b\n")
    listed = open_images(str(tmp_path / "x.csv"))
    assert listed.classes == source.classes
    assert all(listed.reader(item.path).size == (8, 8) for item in listed.splits["train"])
    tokenizer = tiny_tokenizer(tmp_path / "t.safetensors")
    config = TokenizeConfig(source="x", tokenizer=tokenizer, store=tmp_path / "codes")
    assert b"caf\\\\xe9" in plan_job(config, source, tiny_vqvae(), b"").to_json()


def test_a_tar_with_names_that_are_no_utf8_is_listed(tmp_path):
    raw = os.fsdecode(b"caf\xe9")
    path = write_tar(tmp_path / f"{raw}.tar", [(f"{raw}.png", png((1, 1, 1))), (f"{raw}.cls", b"0")])
    source = open_images(str(path))
    assert keys(source) == ["caf%E9/caf%E9"]
    assert source.reader(source.splits["train"][0].path).getpixel((0, 0))[0] == 1


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("0", "1", "10", "2"), "'10' is class number 2, not 10"),
        (("1", "2", "3"), "'1' is class number 0, not 1"),
        (("class1", "class10", "class2"), "'class10' is class number 1, not 2"),
        (("0", "1", "2"), None),
        (("00", "01", "10"), "'10' is class number 2, not 10"),
        (("n01440764", "n01443537", "n15075141"), None),
        (("0-t-shirt", "1-trouser", "apple", "pear"), None),
    ],
)
def test_class_numbers_that_are_not_what_names_suggest_are_noted(classes, said):
    notes = misleading_numbers(classes)
    assert bool(notes) == bool(said)
    assert said is None or said in notes[0]


def test_a_val_label_that_could_be_a_name_or_a_number_is_a_name(tmp_path):
    put(tmp_path, *(f"train/{number}/1.png" for number in (1, 2, 10)), "val/a.png")
    (tmp_path / "val.txt").write_text("a.png 10\n")
    assert keys(ImageFolder(tmp_path), "val") == ["10/a"]
    (tmp_path / "val.txt").write_text("x.png 1\na.png 0\n")
    with pytest.raises(ImageError, match="'0' is no class"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 5_000_000), "labels up to 5000000 make 5,000,001 classes, of which only 2 have an image"),
        ((1, 2), "labels begin at 1; class 0 would have no image to train on"),
    ],
)
def test_number_labels_that_leave_classes_empty_are_refused_unless_the_classes_are_named(tmp_path, labels, message):
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "x.csv").write_text("".join(f"{n}.png,{label}\n" for n, label in enumerate(labels, start=1)))
    tar = [(f"{label}{suffix}", data) for label in labels for suffix, data in ((".png", b""), (".cls", b"%d" % label))]
    for source in (tmp_path / "x.csv", write_tar(tmp_path / "x.tar", tar)):
        with pytest.raises(ImageError, match=f"{message}.*class_names=FILE"):
            open_images(str(source))
    if labels[1] == 2:
        (tmp_path / "names").write_text("zero\none\ntwo\n")
        source = open_images(str(tmp_path / "x.csv"), class_names=tmp_path / "names")
        assert source.classes == ("zero", "one", "two")
        assert source.notes == ("1 of 3 classes have no image to train on, such as 'zero'",)
