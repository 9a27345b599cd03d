"""Samples in all their forms are the same pictures; what is damaged says so."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mvar.errors import ImageError
from mvar.evaluation.pictures import CentreView, NpzPictures, PictureSet, SkipBad, samples_of
from mvar.images.arrays import Bytes, save_png

LABELS = np.repeat([3, 7], 5)


@pytest.fixture(scope="module")
def images_NHWC() -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory, images_NHWC: Bytes) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    for number, image in enumerate(images_NHWC):
        save_png(root / f"folder/{LABELS[number]}/{number:05d}.png", image)
    (root / "folder/sample.json").write_text("{}")
    (root / "tars").mkdir()
    with tarfile.open(root / "tars/samples-000000.tar", "w") as tar:
        for number, label in enumerate(LABELS):
            data = (root / f"folder/{label}/{number:05d}.png").read_bytes()
            for name, content in ((f"{number:05d}.png", data), (f"{number:05d}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    np.savez(root / "plain.npz", arr_0=images_NHWC, arr_1=LABELS)
    np.savez_compressed(root / "packed.npz", images_NHWC, LABELS)
    return {name: root / name for name in ("folder", "tars", "plain.npz", "packed.npz")}


def _all(pictures: PictureSet, batch: int = 4) -> Bytes:
    blocks = list(pictures.blocks(batch))
    assert [len(block) for block in blocks] == [4, 4, 2]
    return np.concatenate(blocks)


@pytest.mark.parametrize("form", ["folder", "tars", "plain.npz", "packed.npz"])
def test_every_form_gives_the_same_pictures_and_classes(forms: dict[str, Path], images_NHWC: Bytes, form: str) -> None:
    pictures = samples_of(forms[form], SkipBad())
    assert len(pictures) == 10 and pictures.size == (6, 8)
    np.testing.assert_array_equal(_all(pictures), images_NHWC)
    assert pictures.labels_N is not None and pictures.labels_N.tolist() == LABELS.tolist()


def test_pictures_of_another_size_than_the_first_are_named(tmp_path: Path) -> None:
    save_png(tmp_path / "0/0.png", np.zeros((8, 8, 3), np.uint8))
    save_png(tmp_path / "0/1.png", np.zeros((8, 9, 3), np.uint8))
    with pytest.raises(ImageError, match="0/1 has 8 x 9 px, the first picture 8 x 8 px"):
        list(samples_of(tmp_path, SkipBad()).blocks(2))
    cut = samples_of(tmp_path, SkipBad(), cut=CentreView(8, 1.0))
    assert [block.shape for block in cut.blocks(2)] == [(2, 8, 8, 3)]


def test_damaged_pictures_are_left_out_as_far_as_allowed(tmp_path: Path) -> None:
    for number in range(6):
        save_png(tmp_path / f"{number % 2}/{number}.png", np.full((8, 8, 3), number, np.uint8))
    for number in (3, 5):
        path = tmp_path / f"1/{number}.png"
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ImageError, match="1/3"):
        list(samples_of(tmp_path, SkipBad(0)).blocks(2))
    with pytest.raises(ImageError, match="--skip-bad 1 allows fewer"):
        list(samples_of(tmp_path, SkipBad(1)).blocks(2))
    bad = SkipBad(2)
    pictures = samples_of(tmp_path, bad)
    kept = np.concatenate(list(pictures.blocks(2)))
    assert kept[:, 0, 0, 0].tolist() == [0, 2, 4, 1] and bad.left_out == ["1/3", "1/5"]
    assert pictures.labels_N is not None and pictures.labels_N.tolist() == [0, 0, 0, 1]


def test_an_npz_that_is_cut_or_changed_is_damaged(tmp_path: Path, forms: dict[str, Path]) -> None:
    data = bytearray(forms["plain.npz"].read_bytes())
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    data[400] ^= 1
    (tmp_path / "changed.npz").write_bytes(data)
    with pytest.raises(ImageError, match="cannot be read"):
        NpzPictures(tmp_path / "cut.npz", "samples cut.npz")
    with pytest.raises(ImageError, match="Bad CRC"):
        list(NpzPictures(tmp_path / "changed.npz", "samples changed.npz").blocks(4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(2, 3, 4, 4\)"),
        ({"other": np.zeros(3)}, "arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)}, "3 labels"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ImageError, match=message):
        samples_of(tmp_path / "other.npz", SkipBad())


def test_an_npz_is_read_without_holding_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "many.npz", arr_0=np.zeros((64, 16, 16, 3), np.uint8))
    largest = 0
    readinto = zipfile.ZipExtFile.readinto

    def watched(self: zipfile.ZipExtFile, place: memoryview) -> int:
        nonlocal largest
        largest = max(largest, len(place))
        return readinto(self, place)

    monkeypatch.setattr(zipfile.ZipExtFile, "readinto", watched)
    assert sum(len(block) for block in samples_of(tmp_path / "many.npz", SkipBad()).blocks(8)) == 64
    assert largest == 8 * 16 * 16 * 3


def test_losses_of_jpeg_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from PIL import Image

    (tmp_path / "0").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "0/0.jpg")
    samples_of(tmp_path, SkipBad())
    assert "JPEG" in caplog.text
