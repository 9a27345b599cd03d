"""Odd images on their way into a store: what the manifest says of them, what is warned of, what --skip-bad counts."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_prep.finalize import finalize, summary
from data_prep.inspect import facts
from data_prep.job import TokenizeConfig
from data_prep.shards import record_path
from data_prep.tokenize import tokenize
from mvar.data.manifest import Manifest
from mvar.data.store import CodeStore
from mvar.errors import ImageError
from mvar.settings import load
from tests.stores import image_folder, tiny_tokenizer


@pytest.fixture
def inputs(tmp_path):
    image_folder(tmp_path / "images")
    tiny_tokenizer(tmp_path / "tokenizer.safetensors")
    return tmp_path


def config(inputs, store="codes", *more):
    given = [f"source={inputs}/images", f"tokenizer={inputs}/tokenizer.safetensors", f"store={inputs / store}"]
    return load(TokenizeConfig, None, [*given, "shard_samples=5", "threads=1", "workers=1", *more])


def made(inputs, store="codes", *more, skip_bad=0):
    tokenize(config(inputs, store, *more), skip_bad=skip_bad)
    return finalize(inputs / store)


def codes(inputs, store, key):
    split = CodeStore.open(inputs / store).split("train")
    places = [place for place in range(len(split)) if split.key(place) == key]
    return split.codes(np.array(places), np.zeros(1, dtype=np.int64))[0]


def test_the_manifest_says_how_pictures_lie_and_the_codes_follow(inputs):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.random.default_rng(1).integers(0, 256, (18, 18, 3), dtype=np.uint8)
    views = ("views.random_crops=0", "views.center=true")
    Image.fromarray(pixels).save(inputs / "images/class0/1.png", exif=exif)
    stored = made(inputs, "stored", *views)
    upright = made(inputs, "upright", *views, "orientation=exif")
    assert stored.transform["orientation"] == "stored"
    assert upright.transform["orientation"] == "exif"
    assert "orientation exif" in facts(inputs / "upright")
    Image.fromarray(pixels[::-1, ::-1]).save(inputs / "images/class0/1.png")
    made(inputs, "turned", *views)
    assert np.array_equal(codes(inputs, "upright", "class0/1"), codes(inputs, "turned", "class0/1"))
    assert not np.array_equal(codes(inputs, "stored", "class0/1"), codes(inputs, "turned", "class0/1"))


def test_jobs_and_manifests_without_the_newer_keys_mean_what_they_meant(inputs):
    made(inputs)
    job = json.loads((inputs / "codes/job.json").read_text())
    assert set(job["transform"]) == {"size", "resize_shorter_side", "filter", "views", "background"}  # As ever.
    path = inputs / "codes/manifest.json"
    tree = json.loads(path.read_text())
    del tree["transform"]["orientation"]
    path.write_text(json.dumps(tree))
    record = record_path(inputs / "codes", "train-000000.tar")
    told = json.loads(record.read_text())
    del told["suspicious"]
    record.write_text(json.dumps(told))
    assert "orientation stored" in facts(inputs / "codes")
    assert tokenize(config(inputs)).written == 0
    finalize(inputs / "codes")


def test_finalize_warns_of_pictures_that_are_nearly_black_or_of_one_colour(inputs):
    assert "WARNING" not in summary(made(inputs, "good"))
    Image.fromarray(np.full((20, 20), 3, np.uint8)).save(inputs / "images/class1/2.png")
    Image.new("RGB", (20, 20), (200, 200, 203)).save(inputs / "images/class2/4.png")
    manifest = made(inputs)
    assert manifest.statistics["suspicious"]["images"] == 2
    assert sorted(manifest.statistics["suspicious"]["such_as"]) == ["class1/2", "class2/4"]
    assert "WARNING: 2 images are nearly black" in summary(Manifest.read(inputs / "codes"))


def test_pictures_of_uncertain_depth_or_beyond_the_limits_are_counted_as_bad(inputs, monkeypatch):
    Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(inputs / "images/class0/float.tiff")
    Image.fromarray(np.random.default_rng(0).integers(0, 4096, (20, 20)).astype(np.uint16)).save(
        inputs / "images/class1/twelve.png"
    )
    Image.new("RGB", (100, 100), (9, 99, 200)).save(inputs / "images/class2/large.png")
    monkeypatch.setattr("mvar.images.pixels.LARGEST_PIXELS", 9999)
    with pytest.raises(ImageError, match="allows fewer"):
        made(inputs, "few", skip_bad=2)
    manifest = made(inputs, skip_bad=3)
    reasons = {bad.key: bad.reason for bad in manifest.splits["train"].quarantine}
    assert reasons.keys() == {"class0/float", "class1/twelve", "class2/large"}
    assert reasons["class2/large"] == "too large: 100 x 100 pixels, more than 9,999"
    with_bits = made(inputs, "bits", "grey_bits=12", skip_bad=2)
    assert with_bits.transform["grey_bits"] == 12
    assert {bad.key for bad in with_bits.splits["train"].quarantine} == {"class0/float", "class2/large"}


def test_what_a_task_leaves_out_is_said(inputs, caplog):
    (inputs / "images/class0/notes.txt").write_text("no picture")
    shutil.copytree(inputs / "images/class1", inputs / "images/@eaDir")
    tokenize(config(inputs))
    said = caplog.text
    assert "left out, no picture that Pillow opens (.txt): 1, such as class0/notes.txt." in said
    assert "such as @eaDir" in said
