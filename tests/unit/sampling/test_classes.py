"""Classes by number and by name, and where the names come from."""

import hashlib
import json

import pytest

from mvar.checkpoint.record import FORMAT_VERSION, RECORD, CheckpointRecord, Progress
from mvar.data.manifest import MANIFEST, Manifest
from mvar.errors import ConfigError
from mvar.evaluate import differing_names, record_beside
from mvar.sampling.classes import class_names, parse_classes
from tests.stores import synthetic_store

NAMES = ("cat", "tench, Tinca tinca", "dog", "crane", "crane", "0-2", "all")
COUNTED = ("1", "10", "2", "3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("=all", [6]),
        ("dog,cat,0", [2, 0]),
        ("0-1, dog", [0, 1, 2]),
        ('"tench, Tinca tinca",5', [1, 5]),
        ("=0-2", [5]),
    ],
)
def test_classes_are_said_by_number_or_by_name(text, expected):
    assert parse_classes(text, 7, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("=10", [1]), ("=2,=10", [2, 1]), ("3", [3]), ("0-1", [0, 1]), ("2-2", [2])]
)
def test_names_that_are_numbers_are_said_with_a_sign(text, expected):
    assert parse_classes(text, 4, COUNTED) == expected


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("10", COUNTED, "10 is also the name of class number 1. Write =10 for the name, 10-10 for number 10"),
        ("2", ("1", "2", "3"), "2 is also the name of class number 1. Write =2 for the name, 2-2 for number 2"),
        ("0-2", NAMES, "0-2 is also the name of class number 5"),
        ("crane", NAMES, "classes 3, 4 are all called 'crane'. Give numbers"),
        ("dgo", NAMES, "no class is called 'dgo'. Names like it: dog"),
        ("", NAMES, "no class is called ''"),
        ("cat\ndog", NAMES, "Expected one line of classes"),
        ("dog", None, "cannot read 'dog'. Expected all, or numbers .*--class-names FILE"),
        ("7", NAMES, "'7' is not within 0-6"),
        ("3-1", NAMES, "'3-1' is not within"),
    ],
)
def test_classes_that_are_not_certain_are_refused(text, names, message):
    with pytest.raises(ConfigError, match=message):
        parse_classes(text, 7, names)


def test_numbers_that_are_their_own_names_need_no_sign():
    assert parse_classes("7,0-2", 10, tuple("0123456789")) == [7, 0, 1, 2]


def test_names_come_from_a_file_or_a_store(tmp_path):
    store = synthetic_store(tmp_path / "codes", train=8, val=0)
    (tmp_path / "names").write_text("cat\ndog\n\nbird \n")
    assert class_names(tmp_path, tmp_path / "names", 3) == ("cat", "dog", "bird")
    assert class_names(tmp_path, store, 4) == ("class0", "class1", "class2", "class3")
    with pytest.raises(ConfigError, match="4 names, but the model has 5 classes"):
        class_names(tmp_path, store, 5)


def test_names_come_from_the_store_that_a_run_was_trained_on(tmp_path):
    store = synthetic_store(tmp_path / "codes", train=8, val=0)
    digest = hashlib.sha256((store / MANIFEST).read_bytes()).hexdigest()
    folder = tmp_path / "run/checkpoints/step-000000007"
    folder.mkdir(parents=True)

    def write(store_path, manifest_digest):
        record = CheckpointRecord(
            format_version=FORMAT_VERSION,
            progress=Progress(step=7, samples=7),
            config={"data": {"store": str(store_path)}},
            model={},
            store=manifest_digest,
            world_size=1,
            zero_stage=0,
            shapes={},
            pieces={},
            files={},
            versions={},
        )
        (folder / RECORD).write_text(record.text())

    write(store, digest)
    for path in (tmp_path / "run", folder):
        assert class_names(path, None, 4) == Manifest.read(store).classes
    assert class_names(tmp_path / "run", None, 3) is None
    write(store, "0" * 64)  # Another store lies there now.
    assert class_names(tmp_path / "run", None, 4) is None
    write("https://somewhere.invalid/codes", digest)
    assert class_names(tmp_path / "run", None, 4) is None
    assert class_names(tmp_path / "model.safetensors", None, 4) is None


def test_other_names_than_those_of_the_samples_are_told(tmp_path):
    def told(*classes: str) -> list[str]:
        return differing_names(tmp_path, record_beside(tmp_path), classes)

    assert told("cat", "dog") == []
    (tmp_path / "sample.json").write_text(json.dumps({"seed": 0}))
    assert told("cat", "dog") == []
    (tmp_path / "sample.json").write_text(json.dumps({"classes": ["cat", "dog", "2"]}))
    assert told("cat", "dog", "bird") == []
    (line,) = told("bird", "cat", "dog")
    assert "2 classes were called otherwise" in line and "class number 0 was 'cat', and is 'bird'" in line
