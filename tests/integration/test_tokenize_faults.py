"""What a tokenize job survives: kills at random moments, claims of the dead, damaged images, a full disk."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.finalize import finalize
from data_prep.job import TokenizeConfig
from data_prep.shards import read_record
from data_prep.tokenize import tokenize
from data_prep.verify import verify
from mvar.data.manifest import MANIFEST
from mvar.data.store import CodeStore
from mvar.errors import ImageError, StoreError
from mvar.settings import load
from tests.stores import image_folder, synthetic_store, tiny_tokenizer

ROOT = Path(__file__).parents[2]
OPTIONS = ("shard_samples=4", "batch=5", "val_fraction=0.2", "views.random_crops=2", "threads=1", "workers=1")

# Forks ready-made tasks, so that a round costs no start of Python. A request: [[arguments, kill after s or null], ...].
NURSERY = """
import json, os, signal, sys, time
from data_prep.tokenize import main
from mvar.cli import run_command
for request in sys.stdin:
    children, codes, begin_s = {}, {}, time.monotonic()
    for number, (arguments, kill_after_s) in enumerate(json.loads(request)):
        pid = os.fork()
        if pid == 0:
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            os._exit(run_command(main, arguments))
        children[pid] = number, kill_after_s
    while children:
        time.sleep(0.001)
        for pid, (number, kill_after_s) in list(children.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[number] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                del children[pid]
            elif kill_after_s is not None and time.monotonic() - begin_s > kill_after_s:
                os.kill(pid, signal.SIGKILL)
    print(json.dumps([codes[number] for number in sorted(codes)]), flush=True)
"""


class Nursery:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def run(self, *tasks):
        """Exit codes of (arguments, kill after s or None) that run side by side."""
        self.process.stdin.write(json.dumps(tasks) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.communicate()


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    image_folder(root / "images")
    tiny_tokenizer(root / "tokenizer.safetensors")
    return root


def arguments(inputs, store, *more):
    given = [f"source={inputs}/images", f"tokenizer={inputs}/tokenizer.safetensors", f"store={store}"]
    return [*given, *OPTIONS, *more]


def config(inputs, store, *more):
    return load(TokenizeConfig, None, arguments(inputs, store, *more))


def contents(store):
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != "last-run.json"}


@pytest.fixture(scope="module")
def pristine(inputs, tmp_path_factory):
    store = tmp_path_factory.mktemp("pristine") / "codes"
    tokenize(config(inputs, store))
    finalize(store)
    return contents(store)


# ---- kills


def survive(nursery, inputs, pristine, store, kills, claim):
    """Run and kill until so many kills have struck; every store that gets complete on the way must be the same."""
    rng = random.Random(kills)
    command = arguments(inputs, store) + ["--claim"] * claim
    begin_s = time.monotonic()
    assert nursery.run((command, None)) == [0]
    alone_s = time.monotonic() - begin_s
    struck = 0
    while struck < kills:
        shutil.rmtree(store)
        done = False
        while not done:
            left = kills - struck
            victims = [(command, rng.uniform(0, alone_s)) for _ in range(min(2, left))]
            codes = nursery.run(*victims, *[(command, None)] * (left == 0))
            struck += codes.count(-9)
            assert set(codes) <= {0, -9}
            done = 0 in codes and (claim or left == 0 or codes[0] == 0)
        finalize(store)
        assert contents(store) == pristine
    return struck


@pytest.mark.parametrize("claim", [False, True])
def test_six_kills_at_random_moments_change_no_byte(nursery, inputs, pristine, tmp_path, claim):
    assert survive(nursery, inputs, pristine, tmp_path / "codes", 6, claim) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("claim", [False, True])
def test_twenty_kills_at_random_moments_change_no_byte(nursery, inputs, pristine, tmp_path, claim):
    assert survive(nursery, inputs, pristine, tmp_path / "codes", 20, claim) >= 20


# ---- claims


def test_tasks_that_claim_shards_share_the_job_and_make_the_same_store(nursery, inputs, pristine, tmp_path):
    store = tmp_path / "codes"
    tasks = [([*arguments(inputs, store), "--claim", "--task", str(task), "--tasks", "3"], None) for task in range(3)]
    assert nursery.run(*tasks) == [0, 0, 0]
    finalize(store)
    assert contents(store) == pristine


def test_the_shard_of_a_dead_task_is_taken_over_by_one_that_is_at_work(nursery, inputs, pristine, tmp_path):
    store = tmp_path / "codes"
    code = (
        "import sys; from pathlib import Path; from mvar.run.claims import Claims\n"
        "Path(sys.argv[1]).mkdir(); print(Claims(Path(sys.argv[1])).take('train-000001.tar'), flush=True)\n"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "True\n"
    working = (arguments(inputs, store, "--claim"), 30.0)
    nursery.process.stdin.write(json.dumps([working]) + "\n")
    nursery.process.stdin.flush()
    while len(list(store.glob("*.tar"))) < len([name for name in pristine if name.endswith(".tar")]) - 1:
        time.sleep(0.01)
    assert not (store / "train-000001.tar").exists()
    holder.kill()
    holder.communicate()
    assert json.loads(nursery.process.stdout.readline()) == [0]
    finalize(store)
    assert contents(store) == pristine


# ---- damaged images


@pytest.fixture
def damaged(inputs, tmp_path):
    """Inputs with two damaged training images, and their keys."""
    root = tmp_path / "inputs"
    shutil.copytree(inputs, root)
    keys = ("class0/1", "class2/5")
    for key in keys:
        path = root / "images" / f"{key}.png"
        path.write_bytes(path.read_bytes()[:90])
    return root, keys


def test_damaged_images_are_left_out_alike_by_any_number_of_tasks(damaged, tmp_path):
    inputs, keys = damaged
    stores = [tmp_path / "one", tmp_path / "three", tmp_path / "claimed"]
    tokenize(config(inputs, stores[0]), skip_bad=2)
    for task in (1, 0, 2):
        tokenize(config(inputs, stores[1], "workers=0"), task, 3, skip_bad=2)
    tokenize(config(inputs, stores[2]), claim=True, skip_bad=2)
    for store in stores:
        finalize(store)
        assert contents(store) == contents(stores[0])
    store = CodeStore.open(stores[0], reader="ram")
    entries = {name: info.quarantine for name, info in store.manifest.splits.items()}
    assert sorted(entry.key for own in entries.values() for entry in own) == sorted(keys)
    assert all("truncated" in entry.reason or "OSError" in entry.reason for own in entries.values() for entry in own)
    assert sum(len(store.split(name)) for name in ("train", "val")) == 22
    present = {store.split(name).key(place) for name in ("train", "val") for place in range(len(store.split(name)))}
    assert present.isdisjoint(keys)
    assert verify(stores[0])["samples"] == 22


def test_one_damaged_image_more_than_allowed_stops_the_task(damaged, tmp_path):
    inputs, keys = damaged
    with pytest.raises(ImageError, match="2 images are damaged, --skip-bad 1 allows fewer") as caught:
        tokenize(config(inputs, tmp_path / "codes"), skip_bad=1)
    assert all(key in str(caught.value) for key in keys)
    with pytest.raises(StoreError, match="missing or damaged"):
        finalize(tmp_path / "codes")


def test_tasks_that_together_leave_out_too_many_are_found_out_by_finalize(damaged, tmp_path):
    inputs, keys = damaged
    store = tmp_path / "codes"
    tokenize(config(inputs, store), skip_bad=2)
    (store / "last-run.json").write_text('{"tasks": 2, "skip_bad": 1}')
    with pytest.raises(StoreError, match=r"2 damaged images were left out, --skip-bad 1") as caught:
        finalize(store)
    assert all(key in str(caught.value) for key in keys)
    assert not (store / MANIFEST).exists()


def test_a_shard_of_damaged_images_alone_is_empty(damaged, tmp_path):
    inputs, _ = damaged
    store = tmp_path / "codes"
    tokenize(config(inputs, store, "shard_samples=1"), skip_bad=2)
    finalize(store)
    opened = CodeStore.open(store, reader="ram", verify=True)
    assert all(shard.samples == 1 for info in opened.manifest.splits.values() for shard in info.shards)
    assert verify(store)["samples"] == 22
    split = opened.split("train")
    assert split.codes(np.arange(len(split)), np.zeros(len(split), dtype=np.int64)).shape == (len(split), 21)


def test_an_image_that_cannot_be_read_is_never_left_out(damaged, tmp_path):
    inputs, keys = damaged
    for key in keys:
        (inputs / "images" / f"{key}.png").unlink()
        (inputs / "images" / f"{key}.png").mkdir()
    with pytest.raises(ImageError, match=r"Is a directory|cannot be read"):
        images = inputs / "list.csv"
        images.write_text("".join(f"images/{key}.png,a\n" for key in keys))
        tokenize(config(inputs, tmp_path / "codes", f"source={images}"), skip_bad=5)


# ---- disk and strangers


def private_mounts():
    """A command prefix that may mount, or None."""
    for prefix in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        if (
            shutil.which("unshare")
            and not subprocess.run(
                [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True
            ).returncode
        ):
            return prefix
    return None


def test_a_disk_that_fills_up_leaves_whole_shards_only(inputs, pristine, tmp_path):
    prefix = private_mounts()
    if prefix is None:
        pytest.skip("a tmpfs cannot be mounted here (no CAP_SYS_ADMIN, no user namespaces)")
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    command = [sys.executable, "-m", "mvar.cli", "tokenize", *arguments(inputs, small)]
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && { "${@:2}"; code=$?; cp -a "$0" "$1"; exit $code; }'
    done = subprocess.run(
        [*prefix, "bash", "-c", script, str(small), str(kept), *command], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stderr
    assert not list(kept.glob(".*"))
    shards = list(kept.glob("*.tar"))
    assert 0 < len(shards) < sum(name.endswith(".tar") for name in pristine)
    assert all(path.read_bytes() == pristine[path.name] for path in shards if read_record(kept, path.name))
    with pytest.raises(StoreError):
        finalize(kept)
    assert tokenize(config(inputs, kept)).verified > 0
    finalize(kept)
    assert contents(kept) == pristine


@pytest.mark.parametrize("claim", [False, True])
def test_a_shard_from_another_tokenizer_stops_the_task(inputs, tmp_path, claim):
    store, other = tmp_path / "codes", synthetic_store(tmp_path / "other")
    tokenize(config(inputs, store))
    for name in ("train-000001.tar", "train-000001.json"):
        shutil.copy(other / name, store / name)
    with pytest.raises(StoreError, match=r"train-000001\.tar: made by another job"):
        tokenize(config(inputs, store), claim=claim)


def test_a_source_that_changed_between_runs_stops_the_task(inputs, tmp_path):
    images = shutil.copytree(inputs / "images", tmp_path / "images")
    store = tmp_path / "codes"
    tokenize(config(inputs, store, f"source={images}"), 0, 2)
    shutil.copy(images / "class0/1.png", images / "class0/new.png")
    with pytest.raises(StoreError, match=r"source\.images: the store has 24, this command 25"):
        tokenize(config(inputs, store, f"source={images}"), 1, 2)
