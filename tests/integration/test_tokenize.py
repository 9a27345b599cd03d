"""Images to a code store: the same bytes from any number of tasks and after kills, refusals where it is not whole."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.finalize import finalize
from data_prep.inspect import facts
from data_prep.job import TokenizeConfig
from data_prep.origin import Origin
from data_prep.tokenize import tokenize
from data_prep.verify import contact_sheet, some_samples, verify
from mvar.cli import main as mvar
from mvar.data.manifest import MANIFEST
from mvar.data.store import CodeStore
from mvar.errors import BackendError, ConfigError, ImageError, StoreError, WriteError
from mvar.files.disk import remove_stale, writing
from mvar.images.arrays import from_uint8
from mvar.images.sources import ImageFolder
from mvar.images.views import ViewPlan
from mvar.run.tasks import array_list
from mvar.settings import load
from tests.stores import SIZE_PX, image_folder, synthetic_store, tiny_tokenizer, tiny_vqvae

OPTIONS = ("shard_samples=4", "batch=5", "val_fraction=0.2", "views.random_crops=2", "views.hflip=both", "threads=1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with images/ and tokenizer.safetensors."""
    root = tmp_path_factory.mktemp("inputs")
    image_folder(root / "images")
    tiny_tokenizer(root / "tokenizer.safetensors")
    return root


def arguments(inputs, store, *more):
    given = [f"source={inputs}/images", f"tokenizer={inputs}/tokenizer.safetensors", f"store={store}"]
    return [*given, *OPTIONS, *more]


def config(inputs, store, *more):
    return load(TokenizeConfig, None, arguments(inputs, store, *more))


@pytest.fixture(scope="module")
def pristine(inputs, tmp_path_factory):
    """A store made by one task."""
    store = tmp_path_factory.mktemp("pristine") / "codes"
    tokenize(config(inputs, store))
    finalize(store)
    return store


@pytest.fixture
def store(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "codes")


def digests(store):
    """Every file of a store but the note of how it was last run."""
    files = [path for path in store.iterdir() if path.name != "last-run.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the same bytes


def test_one_task_and_three_tasks_make_the_same_store(inputs, pristine, tmp_path):
    for task in (2, 0, 1):
        tokenize(config(inputs, tmp_path / "codes"), task, 3)
    finalize(tmp_path / "codes")
    assert digests(tmp_path / "codes") == digests(pristine)


@pytest.mark.parametrize("more", [("workers=0",), ("workers=3",), ("workers=2", "decoders=processes")])
def test_the_way_of_decoding_changes_no_byte(inputs, pristine, tmp_path, more):
    tokenize(config(inputs, tmp_path / "codes", *more))
    finalize(tmp_path / "codes")
    assert digests(tmp_path / "codes") == digests(pristine)


def test_tasks_killed_at_random_moments_make_the_same_store(inputs, pristine, tmp_path):
    """Each round ends by SIGKILL a little after the round's first file; the last round is left alone."""
    store = tmp_path / "codes"
    command = [sys.executable, "-m", "mvar.cli", "tokenize", *arguments(inputs, store)]
    delays = random.Random(4)
    exits = []
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        before = complete(store)
        while process.poll() is None and complete(store) == before and not list(store.glob(".train-*.tmp")):
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        exits.append(process.wait())
        with pytest.raises(StoreError):
            CodeStore.open(store)
    assert exits[0] == -signal.SIGKILL
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    finalize(store)
    assert not list(store.glob(".*"))
    assert digests(store) == digests(pristine)


def complete(store):
    return len(list(store.glob("*.tar")))


def test_two_tasks_that_write_the_same_shards_at_once_do_no_harm(inputs, pristine, tmp_path):
    store = tmp_path / "codes"
    command = [sys.executable, "-m", "mvar.cli", "tokenize", *arguments(inputs, store)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    finalize(store)
    assert digests(store) == digests(pristine)


def test_running_again_verifies_and_writes_nothing(inputs, store):
    times = {path: path.stat().st_mtime_ns for path in store.glob("*.tar")}
    outcome = tokenize(config(inputs, store))
    assert (outcome.written, outcome.verified) == (0, len(times))
    assert {path: path.stat().st_mtime_ns for path in store.glob("*.tar")} == times


@pytest.mark.parametrize("fault", ["flipped", "truncated", "missing", "no record", "torn record", "copy"])
def test_running_again_mends_a_damaged_shard(inputs, pristine, store, fault):
    shard = store / "train-000001.tar"
    record = store / "train-000001.json"
    data = shard.read_bytes()
    if fault == "flipped":
        shard.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    elif fault == "truncated":
        shard.write_bytes(data[:1000])
    elif fault == "missing":
        shard.unlink()
    elif fault == "no record":
        record.unlink()
    elif fault == "copy":  # Of another shard of the same job, record and all.
        shutil.copy(store / "train-000002.tar", shard)
        shutil.copy(store / "train-000002.json", record)
    else:
        record.write_text(record.read_text()[:20])
    assert tokenize(config(inputs, store)).written == 1
    finalize(store)
    assert digests(store) == digests(pristine)


# ---- what is in the store


def test_the_codes_are_those_of_every_view_of_every_image(inputs, pristine):
    source = ImageFolder(inputs / "images", val_fraction=0.2)
    store = CodeStore.open(pristine, verify=True)
    vqvae = tiny_vqvae()
    plans = {
        "train": ViewPlan(SIZE_PX, random_crops=2, hflip="both"),
        "val": ViewPlan(SIZE_PX, random_crops=0, center=True),
    }
    assert store.manifest.classes == source.classes
    for name, plan in plans.items():
        split, items = store.split(name), {item.key: item for item in source.splits[name]}
        assert len(split) == len(items) > 0
        for place in range(len(split)):
            item = items.pop(split.key(place))
            assert split.labels_N[place] == item.label
            views = np.arange(split.views)
            images = from_uint8(plan.render(source.read_rgb(item.path), 0, item.key))
            expected = vqvae.encode(images).numpy()
            assert (split.codes(np.full_like(views, place), views) == expected).mean() > 0.99
        assert not items


@pytest.mark.parametrize("decoders", ["threads", "processes"])
def test_the_same_images_as_a_folder_a_list_and_tars_give_the_same_codes(inputs, tmp_path, decoders):
    items = ImageFolder(inputs / "images").items
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for item in items:
            for name, data in (
                (f"{item.key}.png", Path(item.path).read_bytes()),
                (f"{item.key}.cls", b"%d" % item.label),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "list.csv").write_text("".join(f"{item.path},class{item.label}\n" for item in items))
    plain = ("shuffle=false", "val_fraction=0", "views.center=true", "views.random_crops=0", f"decoders={decoders}")
    found = []
    for number, source in enumerate((inputs / "images", tmp_path / "list.csv", f"pipe:cat {tmp_path}/set.tar")):
        store = tmp_path / f"codes{number}"
        given = (f"source={source}", f"source_cache={tmp_path}/cache", "workers=1", *plain)
        tokenize(config(inputs, store, *given))
        finalize(store)
        split = CodeStore.open(store).split("train")
        places, views = (grid.ravel() for grid in np.meshgrid(np.arange(len(split)), np.arange(split.views)))
        found.append((split.labels_N, split.codes(places, views)))
    for labels, codes in found[1:]:
        assert np.array_equal(labels, found[0][0])
        assert np.array_equal(codes, found[0][1])


def test_shuffled_stores_mix_the_classes_and_plain_ones_keep_their_order(inputs, pristine, tmp_path):
    labels = CodeStore.open(pristine).split("train").labels_N
    assert (np.diff(labels) < 0).any()
    tokenize(config(inputs, tmp_path / "codes", "shuffle=false"))
    finalize(tmp_path / "codes")
    plain = CodeStore.open(tmp_path / "codes").split("train").labels_N
    assert (np.diff(plain) >= 0).all()
    assert np.array_equal(np.sort(labels), plain)


def test_the_tars_stream_through_plain_webdataset(pristine):
    import webdataset

    store = CodeStore.open(pristine)
    for name in ("train", "val"):
        split = store.split(name)
        urls = [str(pristine / shard.name) for shard in store.manifest.splits[name].shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert len(samples) == len(split)
        for place, sample in enumerate(samples):
            codes = np.load(io.BytesIO(sample["codes.npy"]), allow_pickle=False)
            views = np.arange(split.views)
            assert np.array_equal(codes, split.codes(np.full_like(views, place), views))
            assert int(sample["cls"]) == split.labels_N[place]
            assert sample["__key__"] == split.key(place)


def test_finalize_prints_a_table_and_inspect_the_facts(pristine, capsys):
    assert mvar(["finalize", str(pristine)]) == 0
    table = capsys.readouterr().out
    assert "3 classes, training images in each" in table
    assert "entropy, bits a token" in table
    assert all(word in facts(pristine) for word in ("crop1-mirror", "image_folder", "class0", "64 words"))


def test_the_statistics_are_those_of_the_codes(pristine):
    store = CodeStore.open(pristine)
    split = store.split("train")
    indices, views = (grid.ravel() for grid in np.meshgrid(np.arange(len(split)), np.arange(split.views)))
    last_scale = split.codes(indices, views)[:, 5:]
    share = np.unique(last_scale, return_counts=True)[1] / last_scale.size
    statistics = store.manifest.statistics
    assert statistics["words_used"][2] == len(share)
    assert statistics["entropy_bits"][2] == pytest.approx(-(share * np.log2(share)).sum(), abs=1e-3)


def test_a_store_without_validation_images_is_complete(inputs, tmp_path):
    tokenize(config(inputs, tmp_path / "codes", "val_fraction=0"))
    finalize(tmp_path / "codes")
    store = CodeStore.open(tmp_path / "codes")
    assert (len(store.split("train")), len(store.split("val"))) == (24, 0)


# ---- refusals


def test_finalize_names_what_is_missing_and_the_tasks_to_run_again(inputs, store):
    tokenize(config(inputs, store), 0, 4)
    (store / "train-000001.tar").unlink()
    (store / "val-000000.tar").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        finalize(store)
    shards = len(list(store.glob("train-*.json")))
    tasks = array_list({1, shards % 4})
    message = str(caught.value)
    assert "train-000001.tar, val-000000.tar" in message
    assert f"--array={tasks} (with --tasks 4)" in message
    assert not (store / MANIFEST).exists()
    with pytest.raises(StoreError, match=r"--array=.* \(with --tasks 2\)"):
        finalize(store, tasks=2)


def test_task_numbers_are_written_as_slurm_reads_them():
    assert array_list({7, 0, 3, 4, 5, 9}) == "0,3-5,7,9"


def test_finalize_refuses_a_folder_that_is_no_job(tmp_path):
    with pytest.raises(StoreError, match=r"job\.json: cannot be read"):
        finalize(tmp_path)


def test_finalize_refuses_shards_that_are_not_of_the_job(store):
    shutil.copy(store / "train-000000.tar", store / "train-000099.tar")
    with pytest.raises(StoreError, match=r"1 shards are not of this job: train-000099\.tar"):
        finalize(store)


def test_finalize_refuses_a_shard_of_another_job(store, tmp_path):
    other = synthetic_store(tmp_path / "other")
    for name in ("train-000000.tar", "train-000000.json"):
        shutil.copy(other / name, store / name)
    with pytest.raises(StoreError, match=r"train-000000\.tar: made by another job"):
        finalize(store)


def test_finalize_refuses_a_vouched_shard_with_impossible_codes(inputs, store):
    shard, record = store / "train-000000.tar", store / "train-000000.json"
    data = bytearray(shard.read_bytes())
    data[640:642] = (64).to_bytes(2, "little")  # The first code of the first sample: the vocabulary has 64 words.
    shard.write_bytes(data)
    told = json.loads(record.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    record.write_text(json.dumps(told))
    with pytest.raises(StoreError, match="codes below 64"):
        finalize(store)


@pytest.mark.parametrize(
    ("more", "differing"),
    [
        (("views.random_crops=3",), r"splits\.train\.views"),
        (("batch=4",), r"encoding\.batch: the store has 5, this command 4"),
        (("seed=1",), r"encoding\.seed"),
        (("val_fraction=0.5",), r"encoding\.val_fraction.*splits\.train\.samples"),
        (("background=black",), r"transform\.background"),
    ],
)
def test_another_configuration_is_refused_for_the_same_store(inputs, store, more, differing):
    before = digests(store)
    with pytest.raises(StoreError, match=f"being made by another job.*{differing}"):
        tokenize(config(inputs, store, *more))
    assert digests(store) == before


def test_another_tokenizer_is_refused_for_the_same_store(inputs, store, tmp_path):
    other = tiny_tokenizer(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(StoreError, match=r"tokenizer\.sha256: the store has .*, this command"):
        tokenize(config(inputs, store, f"tokenizer={other}"))


def test_a_changed_source_is_refused_for_the_same_store(inputs, store, tmp_path):
    images = shutil.copytree(inputs / "images", tmp_path / "images")
    (images / "class1/3.png").unlink()
    with pytest.raises(StoreError, match=r"source\.images: the store has 24, this command 23"):
        tokenize(config(inputs, store, f"source={images}"))


def test_an_unreadable_image_stops_the_task_and_leaves_no_half_written_shard(inputs, pristine, tmp_path):
    images = shutil.copytree(inputs / "images", tmp_path / "images")
    damaged = images / f"{CodeStore.open(pristine).split('train').key(9)}.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    store = tmp_path / "codes"
    with pytest.raises(ImageError, match=rf"image {damaged}: cannot be decoded"):
        tokenize(config(inputs, store, f"source={images}"))
    assert not list(store.glob(".*"))
    assert all((store / f"{shard.stem}.json").exists() for shard in store.glob("*.tar"))
    assert complete(store) == 2  # Shards of four: the damaged image is in the third.
    with pytest.raises(StoreError, match=r"are missing or damaged"):
        finalize(store)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    path = tmp_path / "shard.tar"
    with pytest.raises(WriteError, match=r"shard\.tar: cannot be written \(No space left"), writing(path) as file:
        file.write(b"half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("task", "tasks"), [(3, 3), (-1, 2), (0, 0)])
def test_an_impossible_task_number_is_refused(inputs, tmp_path, task, tasks):
    with pytest.raises(ConfigError, match="--task"):
        tokenize(config(inputs, tmp_path / "codes"), task, tasks)
    assert not (tmp_path / "codes").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_asked_for_by_name_is_refused(inputs, tmp_path):
    with pytest.raises(BackendError, match="no CUDA device"):
        tokenize(config(inputs, tmp_path / "codes", "device=cuda"))


def test_a_bare_off_in_yaml_means_off(inputs, tmp_path):
    path = tmp_path / "codes.yaml"
    path.write_text("views: {hflip: off}\nsource: a\ntokenizer: b\nstore: c\n")
    assert load(TokenizeConfig, path).views.hflip == "off"


# ---- verify


def test_verify_finds_a_whole_store_whole_and_draws_its_pictures(inputs, pristine, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    tokenizer = str(inputs / "tokenizer.safetensors")
    arguments = [str(pristine), "--tokenizer", tokenizer, "--sheet", str(sheet), "--json", str(tmp_path / "v.json")]
    assert mvar(["verify", *arguments]) == 0
    assert "24 samples" in capsys.readouterr().out
    assert sheet.stat().st_size > 0
    assert json.loads((tmp_path / "v.json").read_text())["figures"]["samples"] == 24


def test_the_last_column_of_the_sheet_is_the_decoded_code(inputs, pristine):
    sheet = contact_sheet(pristine, inputs / "tokenizer.safetensors", samples=2)
    assert sheet.shape == (2 * SIZE_PX + 2, 3 * SIZE_PX + 4, 3)
    assert sheet[:SIZE_PX, :SIZE_PX].std() > 0
    assert not np.array_equal(sheet[:SIZE_PX, :SIZE_PX], sheet[:SIZE_PX, -SIZE_PX:])


def test_the_originals_stand_first_on_the_sheet_where_the_source_is_given(inputs, pristine):
    store = CodeStore.open(pristine)
    origin = Origin.open(store, config(inputs, pristine))
    sheet = contact_sheet(pristine, inputs / "tokenizer.safetensors", samples=2, origin=origin)
    assert sheet.shape == (2 * SIZE_PX + 2, 4 * SIZE_PX + 6, 3)
    place = int(some_samples(store.split("train"), 2)[0])
    key = store.split("train").key(place)
    image = ImageFolder(inputs / "images").read_rgb(inputs / "images" / f"{key}.png")
    views = ViewPlan(SIZE_PX, random_crops=2, hflip="both").render(image, 0, key)
    assert np.array_equal(sheet[:SIZE_PX, :SIZE_PX], views[place % 4])


def test_verify_encodes_images_again_with_the_configuration_of_the_store(inputs, pristine, tmp_path, capsys):
    report = tmp_path / "v.json"
    places = ["--sheet", str(tmp_path / "sheet.png"), "--json", str(report), "--reencode", "4"]
    assert mvar(["verify", str(pristine), *places, *arguments(inputs, pristine)]) == 0
    assert "train: 4 images encoded again, equal codes by scale: 100.0%" in capsys.readouterr().out
    figures = json.loads(report.read_text())["figures"]
    assert min(figures["reencode_agreement_train"], figures["reencode_agreement_val"]) > 0.99
    assert mvar(["verify", str(pristine), *places, *arguments(inputs, pristine, "seed=1")]) == 2
    assert "encoding.seed: the store has 0, this command 1" in capsys.readouterr().err


def test_codes_of_other_images_are_found_out_by_encoding_again(inputs, pristine, monkeypatch):
    origin = Origin.open(CodeStore.open(pristine), config(inputs, pristine))
    split = origin.store.split("train")
    monkeypatch.setattr(origin, "views", lambda split, indices, views=origin.views: views(split, indices[::-1]))
    with pytest.raises(StoreError, match="These are not the codes of these images"):
        origin.agreement(split, np.arange(4))


def test_verify_lists_all_damaged_shards_and_ends_with_exit_code_2(store, capsys):
    for name in ("train-000000.tar", "val-000000.tar"):
        data = bytearray((store / name).read_bytes())
        data[650] ^= 4
        (store / name).write_bytes(data)
    assert mvar(["verify", str(store)]) == 2
    message = capsys.readouterr().err
    assert "train-000000.tar" in message
    assert "val-000000.tar" in message


def test_verify_notices_an_index_that_points_to_other_samples(store):
    """Two samples' labels exchanged in an index that the manifest vouches for."""
    from mvar.data.manifest import INDEX
    from mvar.data.store import read_index, write_index

    tables = read_index(store / INDEX)
    label = tables["train"].label_N.copy()
    first, second = np.flatnonzero(label == label[0])[0], np.flatnonzero(label != label[0])[0]
    label[[first, second]] = label[[second, first]]
    tables["train"] = tables["train"].model_copy(update={"label_N": label})
    with (store / INDEX).open("wb") as file:
        write_index(file, tables)
    tree = json.loads((store / MANIFEST).read_text())
    data = (store / INDEX).read_bytes()
    tree["index"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (store / MANIFEST).write_text(json.dumps(tree))
    with pytest.raises(StoreError, match=r"2 problems:\n.*label 0, the index says 2"):
        verify(store)


def test_pictures_with_another_tokenizer_are_refused(pristine, tmp_path):
    with pytest.raises(StoreError, match="not the one that made code store"):
        contact_sheet(pristine, tiny_tokenizer(tmp_path / "other.safetensors", seed=1))


# ---- files


def test_stale_temporaries_go_and_those_in_use_stay(tmp_path):
    ready, done = tmp_path / "ready", tmp_path / "done"
    code = (
        "import sys, time; from pathlib import Path; from mvar.files.disk import writing\n"
        f"with writing(Path({str(tmp_path / 'x.tar')!r})) as f:\n"
        f"    Path({str(ready)!r}).touch()\n"
        f"    while not Path({str(done)!r}).exists(): time.sleep(0.01)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not ready.exists():
        time.sleep(0.01)
    dead = tmp_path / next(tmp_path.glob(".x.tar~*")).name.replace("x.tar", "y.tar")
    dead.write_bytes(b"left by a killed writer on this host")
    elsewhere = tmp_path / ".z.tar~another-host~1~00000000.tmp"
    elsewhere.write_bytes(b"perhaps in use over there")
    assert remove_stale(tmp_path) == 1
    assert not dead.exists()
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    assert remove_stale(tmp_path) == 1
    done.touch()
    assert writer.wait() == 0
    assert (tmp_path / "x.tar").exists()
