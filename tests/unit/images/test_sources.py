"""Image folders: what is listed, in which order, how odd files become RGB, and what is said about broken ones."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mvar.errors import ImageError
from mvar.images.pixels import DamagedImageError, FileReader, read_rgb
from mvar.images.sources import MAX_KEY, ImageFolder, held_out, tar_key
from tests.stores import image_folder


def picture(size=(20, 16), color=(200, 30, 90)):
    return Image.new("RGB", size, color)


def put(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


# ---- listing


def test_classes_and_images_are_sorted_and_labelled(tmp_path):
    for name in ["b/2.png", "b/10.JPG", "a/z.webp", "c/sub/1.png", "a/.hidden.png", ".git/x.png"]:
        put(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ("a", "b", "c")
    assert [(item.key, item.label) for item in folder.items] == [("a/z", 0), ("b/10", 1), ("b/2", 1), ("c/sub/1", 2)]
    assert folder.splits["val"] == ()
    assert all(folder.read_rgb(item.path).mode == "RGB" for item in folder.items)


def test_train_and_val_folders_are_the_splits(tmp_path):
    for name in ["train/a/1.png", "train/b/2.png", "val/b/3.png", "test/4.png"]:
        put(tmp_path / name)
    folder = ImageFolder(tmp_path, val_fraction=0.5)
    assert folder.classes == ("a", "b")
    assert [item.key for item in folder.splits["train"]] == ["a/1", "b/2"]
    assert [(item.key, item.label) for item in folder.splits["val"]] == [("b/3", 1)]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC_1,n02 1 2 3 4 n02 5 6 7 8\nILSVRC_2,n01 1 2 3 4\n"),
        ("val.txt", "ILSVRC_1.JPEG 1\nILSVRC_2.JPEG 0\n"),
        ("val/val_annotations.txt", "ILSVRC_1.JPEG\tn02\t0\t32\nILSVRC_2.JPEG\tn01\t0\t32\n"),
    ],
)
def test_imagenet_with_a_flat_val_lists_as_with_class_folders(tmp_path, name, lines):
    for file in ["train/n02/a.JPEG", "train/n01/b.JPEG", "val/ILSVRC_1.JPEG", "val/ILSVRC_2.JPEG"]:
        put(tmp_path / "flat" / file)
    for file in ["train/n02/a.JPEG", "train/n01/b.JPEG", "val/n02/ILSVRC_1.JPEG", "val/n01/ILSVRC_2.JPEG"]:
        put(tmp_path / "folders" / file)
    (tmp_path / "flat" / name).write_text(lines)
    flat, folders = ImageFolder(tmp_path / "flat"), ImageFolder(tmp_path / "folders")
    assert flat.classes == ("n01", "n02")
    assert [(item.key, item.label) for item in flat.splits["val"]] == [("n01/ILSVRC_2", 0), ("n02/ILSVRC_1", 1)]
    assert flat.fingerprint == folders.fingerprint
    assert all(flat.read_rgb(item.path).mode == "RGB" for item in flat.splits["val"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"lie in no class folders.*Give val_labels=FILE"),
        ("490\n361\n", r"line 1: expected a file and its class.*LOC_val_solution\.csv"),
        ("1.png a\n2.png c\n", r"line 2: 'c' is no class"),
        ("2.png a\n", r"val/1\.png: .* has no line for it"),
    ],
)
def test_a_flat_val_without_good_labels_is_refused(tmp_path, lines, message):
    for file in ["train/a/1.png", "val/1.png"]:
        put(tmp_path / file)
    if lines is not None:
        (tmp_path / "val.txt").write_text(lines)
    with pytest.raises(ImageError, match=message):
        ImageFolder(tmp_path)


def test_classes_called_train_and_val_among_others_stay_classes(tmp_path):
    for name in ["train/1.png", "plane/2.png", "val/3.png"]:
        put(tmp_path / name)
    assert ImageFolder(tmp_path).classes == ("plane", "train", "val")


def test_held_out_images_are_picked_by_their_keys_alone(tmp_path):
    root = image_folder(tmp_path, classes=2, per_class=50)
    before = ImageFolder(root, val_fraction=0.2)
    put(root / "class0/added.png")
    after = ImageFolder(root, val_fraction=0.2)
    kept = {item.key for item in before.splits["val"]}
    assert 8 <= len(kept) <= 35
    assert kept <= {item.key for item in after.splits["val"]}
    assert kept.isdisjoint(item.key for item in before.splits["train"])
    assert len(before.splits["train"]) + len(kept) == 100


def test_the_share_of_held_out_images_is_the_asked_one():
    keys = [f"n01440764/n01440764_{number}" for number in range(20_000)]
    assert abs(np.mean([held_out(key, 0.1) for key in keys]) - 0.1) < 0.01
    assert held_out("digits/0001", 1.0)
    assert not held_out("digits/0001", 0.0)


def test_the_fingerprint_changes_with_names_and_sizes_only(tmp_path):
    root = image_folder(tmp_path / "one")
    fingerprint = ImageFolder(root).fingerprint
    assert fingerprint.images == 24
    assert ImageFolder(image_folder(tmp_path / "two")).fingerprint == fingerprint
    assert ImageFolder(root, val_fraction=0.3).fingerprint == fingerprint
    put(root / "class1/3.png", picture((100, 100)))
    assert ImageFolder(root).fingerprint != fingerprint
    (image_folder(tmp_path / "two") / "class1/3.png").rename(tmp_path / "two/class1/33.png")
    assert ImageFolder(tmp_path / "two").fingerprint != fingerprint


# ---- keys


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("n01440764/n01440764_10026", "n01440764/n01440764_10026"),
        ("a/b.c", "a/b%2Ec"),
        ("über/ä b", "%C3%BCber/%C3%A4%20b"),
        ("a/100%", "a/100%25"),
        ("__meta__/x", "%5F_meta__/x"),
    ],
)
def test_keys_have_no_dots_and_nothing_that_webdataset_skips(path, key):
    assert tar_key(path) == key


def test_long_names_give_short_distinct_keys():
    keys = {tar_key(f"class/{'x' * 200}{number}") for number in range(10)}
    assert len(keys) == 10
    assert max(map(len, keys)) <= MAX_KEY


def test_files_that_differ_only_in_their_extension_keep_distinct_keys(tmp_path):
    for name in ["a/1.png", "a/1.jpg", "a/2.png"]:
        put(tmp_path / name)
    assert [item.key for item in ImageFolder(tmp_path).items] == ["a/1%2Ejpg", "a/1%2Epng", "a/2"]


def test_two_images_with_one_key_are_refused(tmp_path):
    for name in ["a/1.png", "a/1.jpg", "a/1.jpg.png"]:
        put(tmp_path / name)
    with pytest.raises(ImageError, match="two images share the key 'a/1%2Ejpg'"):
        ImageFolder(tmp_path)


# ---- folders that cannot be used


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere: cannot be listed .*one sub-folder of images for each class"):
        ImageFolder(tmp_path / "nowhere")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"a\.png: cannot be listed"):
        ImageFolder(put(tmp_path / "a.png"))


def test_a_folder_without_classes_is_refused(tmp_path):
    put(tmp_path / "1.png")
    with pytest.raises(ImageError, match=r"no class sub-folders \(1 images lie directly in it\)"):
        ImageFolder(tmp_path)


def test_an_empty_class_folder_is_refused_by_name(tmp_path):
    put(tmp_path / "a/1.png")
    (tmp_path / "b").mkdir()
    with pytest.raises(ImageError, match=r"/b: no images .* Remove the empty class folder"):
        ImageFolder(tmp_path)


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    put(tmp_path / "train/a/1.png")
    put(tmp_path / "val/b/1.png")
    with pytest.raises(ImageError, match="class 'b' has no folder among the training images"):
        ImageFolder(tmp_path)


def test_holding_out_everything_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"val_fraction 1\.0 leaves none of 24 images"):
        ImageFolder(image_folder(tmp_path), val_fraction=1.0)


def test_a_dangling_link_is_refused_by_name(tmp_path):
    put(tmp_path / "a/1.png")
    (tmp_path / "a/2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"a/2\.png: cannot be read"):
        ImageFolder(tmp_path)


# ---- pixels


def test_a_cmyk_jpeg_is_read_as_pillows_rgb(tmp_path):
    path = put(tmp_path / "cmyk.JPEG", picture().convert("CMYK"), quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
    read = np.asarray(read_rgb(path))
    assert np.array_equal(read, expected)
    assert np.abs(read.astype(int) - (200, 30, 90)).max() < 12


def test_a_png_named_jpeg_is_read(tmp_path):
    path = put(tmp_path / "really.JPEG", format="PNG")
    assert np.asarray(read_rgb(path))[0, 0].tolist() == [200, 30, 90]


def test_broken_exif_and_orientation_do_no_harm(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: rotated.
    for number, data in enumerate([exif.tobytes(), exif.tobytes()[:14], b"Exif\0\0broken beyond repair"]):
        path = put(tmp_path / f"{number}.jpg", exif=data)
        assert read_rgb(path).size == (20, 16)


def test_greyscale_and_palette_become_rgb(tmp_path):
    assert read_rgb(put(tmp_path / "l.png", Image.new("L", (4, 4), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert read_rgb(put(tmp_path / "1.png", Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    palette = read_rgb(put(tmp_path / "p.gif", picture().convert("P", palette=Image.Palette.ADAPTIVE)))
    assert np.abs(np.subtract(palette.getpixel((0, 0)), (200, 30, 90))).max() < 4


def test_sixteen_bit_greyscale_keeps_its_upper_bits(tmp_path):
    pixels = np.array([[0, 0x1234, 0x80FF, 0xFFFF]], dtype=np.uint16)
    read = np.asarray(read_rgb(put(tmp_path / "deep.png", Image.fromarray(pixels))))
    assert read[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


@pytest.mark.parametrize(("background", "expected"), [("white", 255), ("black", 0), ("drop", 40)])
def test_transparency_is_laid_on_the_background(tmp_path, background, expected):
    path = put(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (40, 40, 40, 0)))
    assert FileReader(background)(path).getpixel((0, 0)) == (expected,) * 3
    solid = put(tmp_path / "solid.webp", Image.new("RGBA", (4, 4), (10, 200, 30, 255)), lossless=True)
    assert FileReader(background)(solid).getpixel((0, 0)) == (10, 200, 30)


def test_a_transparent_palette_colour_is_laid_on_the_background(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    read = read_rgb(put(tmp_path / "p.png", image, transparency=0))
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((1, 1)) == (200, 100, 50)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_truncated_image_is_refused_by_name(tmp_path, kind):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ImageError, match=rf"image {path}: cannot be decoded .* Replace or remove the file"):
        read_rgb(path)


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_garbage_is_refused_by_name(tmp_path, data):
    path = tmp_path / "garbage.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=str(path)):
        read_rgb(path)


def test_an_image_that_cannot_be_read_is_not_taken_for_a_damaged_one(tmp_path):
    with pytest.raises(ImageError, match="cannot be read") as caught:
        read_rgb(tmp_path / "nowhere.png")
    assert not isinstance(caught.value, DamagedImageError)


def test_damage_is_described_alike_every_time(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    messages = set()
    for _ in range(3):
        with pytest.raises(DamagedImageError) as caught:
            read_rgb(tmp_path / "x.png")
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


def test_readers_and_their_errors_travel_between_processes(tmp_path):
    reader = pickle.loads(pickle.dumps(FileReader("black")))
    with pytest.raises(ImageError) as caught:
        reader(tmp_path / "nowhere.png")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
