"""A store copied to a node's own disk: once, whole, and shared."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvar.data import staging
from mvar.data.manifest import MANIFEST
from mvar.data.store import CodeStore
from mvar.errors import StoreError
from tests.stores import synthetic_store

COPY = """
import sys
from pathlib import Path
from mvar.data.staging import stage
print(stage(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return synthetic_store(tmp_path_factory.mktemp("store") / "codes")


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "codes")


def all_codes(store):
    split = store.split("train")
    return split.codes(np.arange(len(split)), np.arange(len(split)) % split.views)


def from_folder(folder):
    return str(folder)


def from_pipe(folder):
    return f"pipe:cat {folder}/{{file}}"


def from_file_url(folder):
    return f"file://{folder}"


@pytest.mark.parametrize("address", [from_folder, from_pipe, from_file_url])
def test_a_staged_store_reads_as_the_original_and_needs_it_no_more(folder, tmp_path, address):
    expected = all_codes(CodeStore.open(folder))
    url = address(folder)
    store = CodeStore.open(url, reader="staged", stage=tmp_path / "stage", verify=True)
    assert store.folder.parent == tmp_path / "stage"
    for path in folder.glob("*.tar"):
        path.unlink()
    again = CodeStore.open(url, reader="staged", stage=tmp_path / "stage")
    assert np.array_equal(all_codes(again), expected)
    assert again.quantizer().patch_nums == store.manifest.patch_nums


def test_the_processes_of_a_node_share_one_copy(folder, tmp_path):
    """Every file is fetched by a command that counts its calls."""
    calls = tmp_path / "calls"
    url = f"pipe:echo {{file}} >> {calls}; cat {folder}/{{file}}"
    command = [sys.executable, "-c", COPY, url, str(tmp_path / "stage")]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) for _ in range(2)
    ]
    targets = {rank.communicate()[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len(targets) == 1
    fetched = [name for name in calls.read_text().split() if name != MANIFEST]
    assert len(fetched) == len(set(fetched)) == 2 + len(list(folder.glob("*.tar")))


def test_a_damaged_original_is_refused_and_leaves_no_complete_copy(folder, tmp_path):
    shard = folder / "train-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"train-000002\.tar: arrived damaged"):
        CodeStore.open(folder, reader="staged", stage=tmp_path / "stage")
    assert not list((tmp_path / "stage").glob(f"*/{MANIFEST}"))
    assert not list((tmp_path / "stage").glob("*/train-000002.tar"))
    data[700] ^= 1
    shard.write_bytes(data)
    CodeStore.open(folder, reader="staged", stage=tmp_path / "stage", verify=True)


def test_an_interrupted_copy_is_carried_on(folder, tmp_path, monkeypatch):
    fetched = []

    def break_down(url, path, *, sha256):
        if len(fetched) == 3:
            raise StoreError("the network is gone")
        fetched.append(path.name)
        fetch(url, path, sha256=sha256)

    fetch = staging.fetch
    monkeypatch.setattr(staging, "COPIES_AT_ONCE", 1)
    monkeypatch.setattr(staging, "fetch", break_down)
    with pytest.raises(StoreError, match="network"):
        staging.stage(folder, tmp_path / "stage")
    later = []
    monkeypatch.setattr(staging, "fetch", lambda url, path, sha256: (later.append(path.name), fetch(url, path)))
    target = staging.stage(folder, tmp_path / "stage")
    assert set(later).isdisjoint(fetched)
    assert CodeStore.open(target, verify=True).manifest == CodeStore.open(folder).manifest


def test_another_store_under_the_same_address_gets_another_copy(folder, tmp_path):
    first = staging.stage(folder, tmp_path / "stage")
    shutil.rmtree(folder)
    synthetic_store(folder, train=7)
    assert staging.stage(folder, tmp_path / "stage") != first


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/x", "a; rm -r x", "$(x)", ".hidden", ""])
def test_a_manifest_with_names_that_are_not_plain_is_refused(folder, tmp_path, name):
    tree = json.loads((folder / MANIFEST).read_text())
    tree["splits"]["train"]["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"damaged at splits\.train\.shards\.0\.name"):
        staging.stage(from_pipe(folder), tmp_path / "stage")


def test_too_little_room_is_said_before_anything_is_copied(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StoreError, match=r"bytes have to be copied, .* has 1,000 free"):
        staging.stage(folder, tmp_path / "stage")
    assert not list((tmp_path / "stage").glob("*/*.tar"))


def test_staging_needs_a_folder_and_a_url_needs_staging(folder, tmp_path):
    with pytest.raises(StoreError, match=r"data\.stage"):
        CodeStore.open(folder, reader="staged")
    with pytest.raises(StoreError, match=r"data\.reader=staged"):
        CodeStore.open("https://nowhere.invalid/codes")
    with pytest.raises(StoreError, match="cannot be fetched"):
        CodeStore.open("pipe:false {file}", reader="staged", stage=tmp_path)
    (folder / MANIFEST).unlink()
    with pytest.raises(StoreError, match="mvar finalize"):
        CodeStore.open(folder, reader="staged", stage=tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, None])
def test_where_there_are_no_locks_every_rank_copies_and_removes_nobody_elses_work(
    folder, tmp_path, monkeypatch, number
):
    """None: a file system that grants every lock to everybody."""

    def refuse(*_):
        if number is not None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    target = staging.stage(folder, tmp_path / "stage")
    (target / MANIFEST).unlink()
    other = target / ".train-000000.tar~another~1~0.tmp"
    other.touch()
    assert staging.stage(folder, tmp_path / "stage") == target and other.exists()
    assert all_codes(CodeStore.open(target)).shape == all_codes(CodeStore.open(folder)).shape
