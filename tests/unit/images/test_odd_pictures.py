"""Pictures of odd depth, size and metadata: what they become, and what is refused by name and counted as damage."""

import io
import pickle
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mvar.errors import ImageError
from mvar.images import pixels
from mvar.images.pixels import (
    DamagedImageError,
    FileReader,
    ImageDepthError,
    ImageSizeError,
    Rules,
    decode,
    read_rgb,
)
from mvar.images.views import LARGEST_RESIZED, Frame, ViewPlan, centre_view, random_crop_view, resize_shorter_side


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind, **options)
    return buffer.getvalue()


def grey(data, **rules):
    return np.asarray(decode(data, "x", Rules(**rules)))[0, :, 0].tolist()


# ---- depth


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [(8, [0, 7, 255], [0, 7, 255]), (10, [0, 512, 1023], [0, 128, 255]), (12, [0, 0x800, 0xFFF], [0, 128, 255])],
)
def test_values_of_few_bits_in_16_are_refused_and_scaled_where_their_bits_are_said(bits, values, expected):
    data = encoded(np.array([values], np.uint16))
    with pytest.raises(ImageDepthError, match=rf"values up to {values[-1]}: values of fewer bits.*grey_bits=8, 12"):
        grey(data)
    assert grey(data, grey_bits=bits) == expected


def test_dark_16_bit_pictures_are_read_where_their_bits_are_said_and_black_ones_always():
    assert grey(encoded(np.array([[0, 300, 4095]], np.uint16)), grey_bits=16) == [0, 1, 15]
    assert grey(encoded(np.zeros((1, 3), np.uint16))) == [0, 0, 0]


def test_values_beyond_the_bits_that_were_said_are_refused():
    with pytest.raises(ImageDepthError, match="from 0 to 4096, which 12 bits do not hold"):
        grey(encoded(np.array([[0, 4096]], np.uint16)), grey_bits=12)


def test_32_bit_integers_need_their_bits_said():
    data = encoded(np.array([[0, 100, 255]], np.int32), "TIFF")
    with pytest.raises(ImageDepthError, match=r"32-bit greyscale with values from 0 to 255.*grey_bits=N"):
        grey(data)
    assert grey(data, grey_bits=8) == [0, 100, 255]
    with pytest.raises(ImageDepthError, match="from -1 to 255"):
        grey(encoded(np.array([[-1, 255]], np.int32), "TIFF"), grey_bits=8)


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_floating_point_greyscale_is_refused(scale):
    data = encoded(np.linspace(0, scale, 6, dtype=np.float32).reshape(2, 3), "TIFF")
    with pytest.raises(ImageDepthError, match="floating-point greyscale"):
        grey(data)


def test_a_pgm_of_12_bits_says_so_itself():
    assert grey(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 0x800, 0xFFF)) == [0, 128, 255]


def png_48_bit(values):
    """A PNG of one row of 16-bit RGB pixels, all channels alike."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 2, 0, 0, 0)
    row = b"\0" + b"".join(struct.pack(">3H", value, value, value) for value in values)
    return pixels.PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def test_16_bit_colours_of_fewer_bits_are_refused():
    assert grey(png_48_bit([0, 0x8000, 0xFFFF])) == [0, 128, 255]
    for highest in (255, 4095):
        with pytest.raises(ImageDepthError, match="16-bit colours below 4096"):
            grey(png_48_bit([0, highest]))


# ---- orientation


def turned(tag, kind="JPEG", **options):
    array = np.zeros((40, 80, 3), np.uint8)
    array[:20, :40] = 255  # The stored picture is bright in its upper left quarter.
    exif = Image.Exif()
    exif[pixels.ORIENTATION_TAG] = tag
    return encoded(array, kind, exif=exif, **options)


@pytest.mark.parametrize(("tag", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0)), (2, (0, -1))])
def test_exif_orientation_is_applied_where_that_is_asked_for(tag, corner):
    stored = decode(turned(tag), "x", Rules())
    assert stored.size == (80, 40)
    assert np.asarray(stored)[0, 0].min() > 240
    upright = np.asarray(decode(turned(tag), "x", Rules(orientation="exif")))
    assert upright.shape[:2] == ((80, 40) if tag > 4 else (40, 80))
    assert upright[corner].min() > 240
    others = [place for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if place != corner]
    assert max(upright[place].max() for place in others) < 15


@pytest.mark.parametrize("exif", [b"Exif\0\0broken beyond repair", b"Exif\0\0MM\0*"])
def test_broken_exif_turns_nothing(exif):
    data = encoded(np.zeros((4, 6, 3), np.uint8), "JPEG", exif=exif)
    assert decode(data, "x", Rules(orientation="exif")).size == (6, 4)


def test_a_tiff_is_turned_once():
    for orientation in ("stored", "exif"):  # Pillow turns it while it decodes.
        upright = decode(turned(6, "TIFF"), "x", Rules(orientation=orientation))
        assert upright.size == (40, 80)
        assert np.asarray(upright)[0, -1].min() > 240


# ---- size and metadata


def test_a_good_png_with_long_metadata_is_read(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (2 << 20), zip=True)
    array = np.full((3, 4, 3), 77, np.uint8)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(array, pnginfo=texts))
    assert np.array_equal(np.asarray(read_rgb(path)), array)


def test_a_damaged_png_with_long_metadata_stays_damaged():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * (2 << 20), zip=True)
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), pnginfo=texts)
    with pytest.raises(DamagedImageError, match="cannot be decoded"):
        decode(data[:-6000], "x", Rules())


def test_a_picture_above_pillows_limit_is_read_and_one_above_ours_is_refused_by_name(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS >= pixels.LARGEST_PIXELS > 89_478_485
    data = encoded(np.zeros((20, 30), np.uint8))
    monkeypatch.setattr(pixels, "LARGEST_PIXELS", 600)
    assert decode(data, "x", Rules()).size == (30, 20)
    monkeypatch.setattr(pixels, "LARGEST_PIXELS", 599)
    with pytest.raises(
        ImageSizeError, match=r"image x: too large \(30 x 20 pixels, more than 599\).*--skip-bad"
    ) as caught:
        decode(data, "x", Rules())
    assert caught.value.reason == "too large: 30 x 20 pixels, more than 599"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(ImageSizeError, match="too large"):
        decode(data, "x", Rules())


def test_a_file_above_our_limit_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(encoded(np.zeros((20, 30), np.uint8)))
    monkeypatch.setattr(pixels, "LARGEST_BYTES", 20)
    with pytest.raises(ImageSizeError, match=r"x\.png: too large \(\d+ bytes, more than 20\)"):
        read_rgb(tmp_path / "x.png")


def test_a_file_of_another_size_than_listed_is_refused_and_is_no_damage(tmp_path):
    data = encoded(np.zeros((4, 4), np.uint8))
    (tmp_path / "x.png").write_bytes(data)
    assert FileReader()(tmp_path / "x.png", len(data)).size == (4, 4)
    with pytest.raises(ImageError, match=r"had 9 when the images were listed.*listing\.json\.gz") as caught:
        FileReader()(tmp_path / "x.png", 9)
    assert not isinstance(caught.value, DamagedImageError)


def test_errors_with_their_reasons_travel_between_processes():
    error = pickle.loads(pickle.dumps(ImageSizeError("image x: too large (y).", "too large: y")))
    assert (str(error), error.reason, type(error)) == ("image x: too large (y).", "too large: y", ImageSizeError)


LONG = """
import resource
import numpy as np
from PIL import Image
from mvar.images.views import ViewPlan, centre_view
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
row = np.random.default_rng(0).integers(0, 256, (1, 20_000, 3), dtype=np.uint8)
for array in (row, row.transpose(1, 0, 2)):
    views = ViewPlan(256, random_crops=2, center=True).render(Image.fromarray(np.ascontiguousarray(array)), 0, "k")
    assert views.shape == (3, 256, 256, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
"""


def test_a_picture_of_20000_by_1_takes_little_memory():
    room_bytes = 4 << 30  # Enough for Python; the whole picture would need 6.6 GB after its resize.
    done = subprocess.run(
        [sys.executable, "-c", LONG],
        cwd=Path(__file__).parents[3],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (room_bytes, room_bytes)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024


@pytest.mark.parametrize("shape", [(3, 900), (900, 3), (40, 700)])
def test_crops_made_piece_by_piece_are_those_of_the_whole_resize(shape, monkeypatch):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8))
    plan = ViewPlan(32, random_crops=6, center=True)
    whole = plan.render(image, 0, "k")
    monkeypatch.setattr("mvar.images.views.LARGEST_RESIZED", 100)
    assert Frame.of(image, 32).image is image
    pieces = plan.render(image, 0, "k")
    assert np.abs(whole.astype(int) - pieces).max() <= 1
    assert (whole == pieces).mean() > 0.99
    assert np.array_equal(centre_view(Frame.of(image, 32).image, 32), pieces[0])


def test_pictures_of_usual_proportions_are_resized_as_a_whole():
    assert LARGEST_RESIZED > 288 * 288 * 100
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    frame = Frame.of(image, 32)
    assert np.array_equal(np.asarray(frame.image), np.asarray(resize_shorter_side(image, 32)))
    assert np.array_equal(random_crop_view(frame.image, 32, 0, "k", 1), random_crop_view(image, 32, 0, "k", 1))
