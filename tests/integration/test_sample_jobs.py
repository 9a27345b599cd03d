"""Jobs of `mvar sample`: any number of tasks, killed at any moment, give the same bytes; nothing half is taken."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvar.cli import main as mvar
from mvar.files.disk import host_name
from mvar.images.layouts import open_images
from mvar.sampling import painter
from mvar.sampling.job import RECORDS, SampleJob
from mvar.sampling.pictures import Picture
from mvar.sampling.writer import PartsWriter
from mvar.testing.ranks import Ranks
from mvar.testing.tiny_pairs import CLASSES, SIDE_PX, write_pair

KINDS = ("folders", "tars", "npz")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pair(tmp_path_factory.mktemp("model"))


def sample(places: list[str], out: Path, *options: object) -> int:
    return mvar(["sample", *places, "--device", "cpu", "--out", str(out), *map(str, options)])


def merged(out: Path) -> str:
    """Digest of all its images."""
    to = out.parent / f"{out.name}-merged.npz"
    assert mvar(["merge-samples", str(out), "--out", str(to)]) == 0
    return hashlib.sha256(to.read_bytes()).hexdigest()


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "last-run.json"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_and_interruptions_do_not_change_a_byte(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    job = ("--num", 46, "--kind", kind, "--batch", 4, "--part", 10)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(painter, "cores", lambda: 1)
    assert sample(places, whole, *job) == 0
    monkeypatch.setattr(painter, "cores", lambda: 3)
    for task in (2, 0, 1):
        assert sample(places, parts, *job, "--tasks", 3, "--task", task) == 0
    expected = contents(whole)
    assert contents(parts) == expected
    digest = merged(whole)

    # As after a kill: a part without its record, one with half its files, one damaged, a temporary of a dead process.
    job_of = SampleJob.read(whole)
    assert job_of is not None and len(job_of.parts) == 5
    packing = job_of.packing(whole)
    (whole / RECORDS / "part-000001.json").unlink()
    packing.files(job_of.parts[3])[0].unlink()
    damaged = packing.files(job_of.parts[4])[-1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    folder = packing.files(job_of.parts[0])[0].parent
    (folder / f".00000.png~{host_name()}~123~00000000.tmp").write_bytes(b"half")
    untouched = packing.files(job_of.parts[2])[0].stat().st_mtime_ns
    assert sample(places, whole, *job) == 0
    assert contents(whole) == expected
    assert packing.files(job_of.parts[2])[0].stat().st_mtime_ns == untouched
    assert merged(whole) == digest


def test_all_kinds_of_folder_give_the_same_npz(places: list[str], tmp_path: Path) -> None:
    job = ("--num", 22, "--batch", 4, "--part", 9)
    for kind in KINDS:
        assert sample(places, tmp_path / kind, *job, "--kind", kind) == 0
    assert len({merged(tmp_path / kind) for kind in KINDS}) == 1
    with np.load(tmp_path / "npz-merged.npz", allow_pickle=False) as arrays:
        images_NHWC, labels_N = arrays["arr_0"], arrays["arr_1"]
    assert images_NHWC.dtype == np.uint8 and images_NHWC.shape == (22, SIDE_PX, SIDE_PX, 3)
    # Class after class in turn, so that every stretch has all classes.
    assert labels_N.tolist() == [number % CLASSES for number in range(22)]
    for number in (0, 7, 21):
        path = Picture(number % CLASSES, number // CLASSES).path(tmp_path / "folders")
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), images_NHWC[number])
    told = json.loads((tmp_path / "npz-merged.npz.json").read_text())
    assert told["npz"]["sha256"] == merged(tmp_path / "npz") and told["job"]["seed"] == 0
    assert {"options", "precision", "weights", "tokenizer", "batch"} <= told["job"].keys()


def test_folders_and_tars_are_sources_like_any_other(places: list[str], tmp_path: Path) -> None:
    for kind in ("folders", "tars"):
        assert sample(places, tmp_path / kind, "--num", 12, "--part", 5, "--kind", kind) == 0
        source = open_images(str(tmp_path / kind))
        assert source.fingerprint.images == 12 and len(source.classes) == CLASSES
    with tarfile.open(tmp_path / "tars/samples-000001.tar") as tar:
        assert tar.getnames()[:4] == ["00000005.png", "00000005.cls", "00000006.png", "00000006.cls"]
        members = {name: tar.extractfile(name) for name in tar.getnames()[:2]}
    assert all(member is not None for member in members.values())


def test_the_npz_is_a_plain_zip_without_times(places: list[str], tmp_path: Path) -> None:
    assert sample(places, tmp_path / "out", "--num", 5, "--kind", "npz", "--merge", tmp_path / "all.npz") == 0
    with zipfile.ZipFile(tmp_path / "all.npz") as archive:
        assert [(info.filename, info.date_time, info.compress_type) for info in archive.infolist()] == [
            (name, (1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED) for name in ("arr_0.npy", "arr_1.npy")
        ]
        with archive.open("arr_0.npy") as member:  # As ADM's evaluation reads it.
            assert np.lib.format.read_magic(member) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    assert (shape, fortran, dtype) == ((5, SIDE_PX, SIDE_PX, 3), False, np.dtype(np.uint8))


def test_the_last_task_merges(places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--num", 12, "--part", 4, "--tasks", 2, "--merge", tmp_path / "all.npz")
    assert sample(places, tmp_path / "out", *job, "--task", 1) == 0
    assert "--merge: left to the task that ends last; 2 parts are not drawn yet" in capsys.readouterr().out
    assert not (tmp_path / "all.npz").exists()
    assert sample(places, tmp_path / "out", *job, "--task", 0) == 0
    assert hashlib.sha256((tmp_path / "all.npz").read_bytes()).hexdigest() == merged(tmp_path / "out")


def test_what_the_first_task_chose_is_the_others_too(places: list[str], tmp_path: Path) -> None:
    assert sample(places, tmp_path, "--num", 12, "--batch", 3, "--part", 6, "--precision", "bf16") == 0
    made = contents(tmp_path)
    assert sample(places, tmp_path, "--num", 12) == 0
    assert contents(tmp_path) == made


def refused(capsys: pytest.CaptureFixture[str], argv: list[Any]) -> str:
    """The one message of a command that must fail."""
    assert mvar([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_refuses_what_is_missing_and_names_the_tasks(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out, to = tmp_path / "out", tmp_path / "all.npz"
    job = ("--num", 30, "--part", 5, "--kind", kind, "--tasks", 4)
    for task in (0, 3):
        assert sample(places, out, *job, "--task", task) == 0
    pinned = SampleJob.read(out)
    assert pinned is not None
    lost = pinned.packing(out).files(pinned.parts[4])[-1]
    lost.unlink()
    said = refused(capsys, ["merge-samples", out, "--out", to])
    assert "4 of 6 parts, 20 of 30 images, are missing or damaged" in said
    assert f"samples-000004 ({lost} is missing)" in said and "--array=0-2 (with --tasks 4)" in said
    assert "--array=1-2,4-5 (with --tasks 8)" in refused(capsys, ["merge-samples", out, "--out", to, "--tasks", 8])
    assert not to.exists()


def test_a_merge_refuses_what_is_not_one_jobs(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other, to = tmp_path / "out", tmp_path / "other", tmp_path / "all.npz"
    base = ("--num", 12, "--part", 6, "--kind", "npz")
    assert sample(places, out, *base) == 0
    assert sample(places, other, *base, "--cfg", 2, "--seed", 3) == 0
    for name in ("samples-000001.npz", f"{RECORDS}/part-000001.json"):
        (out / name).write_bytes((other / name).read_bytes())
    said = refused(capsys, ["merge-samples", out, "--out", to])
    assert "samples-000001 was drawn by another job" in said
    assert "options.cfg: the part has 2.0, the folder's job 1.5" in said and "seed: the part has 3" in said
    said = refused(capsys, ["merge-samples", tmp_path, "--out", to])
    assert "holds no job of `mvar sample`" in said
    (out / "sample.json").write_text('{"seed": 0}')
    assert "not a job of this version" in refused(capsys, ["merge-samples", out, "--out", to])
    assert not to.exists()


def test_weights_that_differ_in_one_value_are_another_job(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert sample(places, tmp_path / "out", "--num", 4) == 0
    with safe_open(places[1], "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["blocks.1.ffn.fc2.weight"][-1, -1] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    words = ["sample", "--weights", tmp_path / "other.safetensors", *places[2:], "--device", "cpu", "--num", 4]
    assert "weights: the folder has" in refused(capsys, [*words, "--out", tmp_path / "out"])


def test_pixels_that_are_not_those_drawn_are_never_merged(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the right digest that holds other images: a record made over, or a disk that lied while writing."""
    out, to = tmp_path / "out", tmp_path / "all.npz"
    assert sample(places, out, "--num", 8, "--part", 4) == 0
    Image.new("RGB", (SIDE_PX, SIDE_PX)).save(out / "0001/00000.png")
    pinned = SampleJob.read(out)
    assert pinned is not None
    path = out / RECORDS / "part-000000.json"
    size, digest = pinned.packing(out).digest(pinned.parts[0])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bytes": size, "sha256": digest}))
    assert "the pixels of samples-000000 are not those that were drawn" in refused(
        capsys, ["merge-samples", out, "--out", to]
    )
    for wrong, kind in (("another size", (9, 8)), ("not three channels", (SIDE_PX, 4))):
        Image.new("RGB", kind).save(out / "0001/00000.png")
        size, digest = pinned.packing(out).digest(pinned.parts[0])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bytes": size, "sha256": digest}))
        assert f"{kind[0]} x {kind[1]} pixels" in refused(capsys, ["merge-samples", out, "--out", to]), wrong
    assert not to.exists()


def test_an_npz_of_another_size_is_refused(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sample(places, out, "--num", 8, "--part", 4, "--kind", "npz") == 0
    pinned = SampleJob.read(out)
    assert pinned is not None
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    (out / "samples-000001.npz").write_bytes(buffer.getvalue())
    assert "samples-000001 (damaged)" in refused(capsys, ["merge-samples", out, "--out", tmp_path / "all.npz"])
    path = out / RECORDS / "part-000001.json"
    size, digest = pinned.packing(out).digest(pinned.parts[1])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bytes": size, "sha256": digest}))
    said = refused(capsys, ["merge-samples", out, "--out", tmp_path / "all.npz"])
    assert "arr_0 is uint8 (4, 16, 16, 3), expected uint8 (4, 8, 8, 3)" in said


def test_a_disk_that_fails_ends_the_job_with_one_message(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writing has a thread of its own: what goes wrong there must reach the user, and nobody hangs."""
    from mvar.files.disk import cannot_write

    written = []

    def fail(writer: PartsWriter, *arguments: Any) -> None:
        if written:
            raise cannot_write(tmp_path, OSError(28, "No space left on device"))
        written.append(arguments)

    monkeypatch.setattr(PartsWriter, "_write", fail)
    said = refused(capsys, ["sample", *places, "--device", "cpu", "--out", tmp_path / "out", "--num", 90, "--part", 8])
    assert "No space left on device" in said
    assert not list((tmp_path / "out").glob(f"{RECORDS}/*.json"))


def storm(places: list[str], out: Path, job: list[str], tasks: int, kills: int, seed: int) -> int:
    """Run all tasks of a job at once; SIGKILL one at work now and then, and start it again. Returns the kills."""
    chance, done = random.Random(seed), 0

    def start(task: int) -> Ranks:
        share = ["--tasks", str(tasks), "--task", str(task)]
        argv = [*places, "--device", "cpu", "--out", str(out), *job, *share]
        return Ranks("mvar.testing.ranks:command", ["mvar.sample", argv], 1, out.parent / f"logs/{out.name}-{task}")

    def at_work(task: int) -> bool:
        """It has begun to draw, and is not done."""
        said = running[task].logs[0].read_text(errors="replace") if running[task].logs[0].exists() else ""
        return running[task].alive() and said.count("parts are this task's") > seen[task]

    seen = dict.fromkeys(range(tasks), 0)
    running = {task: start(task) for task in range(tasks)}
    while any(process.alive() for process in running.values()):
        time.sleep(chance.uniform(0, 0.2))
        ready = [task for task in running if at_work(task)]
        if done < kills and ready:
            victim = chance.choice(ready)
            time.sleep(chance.uniform(0, 0.3))
            if running[victim].alive():
                running[victim].kill()
                done += running[victim].processes[0].exitcode == -9
            seen[victim] = running[victim].logs[0].read_text(errors="replace").count("parts are this task's")
            running[victim] = start(victim)
    for task, process in running.items():
        assert process.wait() == [0], f"task {task}\n{process.output()}"
    return done


@pytest.mark.parametrize(("images", "tasks", "kills"), [(96, 2, 3), pytest.param(1000, 4, 12, marks=pytest.mark.slow)])
def test_tasks_that_are_killed_at_random_give_the_bytes_of_one_that_nobody_disturbed(
    places: list[str], tmp_path: Path, images: int, tasks: int, kills: int
) -> None:
    part = 12 if images < 1000 else 40
    job = ["--num", str(images), "--per-class", "balanced", "--batch", "4", "--part", str(part)]
    assert sample(places, tmp_path / "one", *job) == 0
    if images >= 1000:
        assert storm(places, tmp_path / "several", job, tasks, 0, seed=0) == 0
        assert contents(tmp_path / "several") == contents(tmp_path / "one")
        assert merged(tmp_path / "several") == merged(tmp_path / "one")
    assert storm(places, tmp_path / "killed", job, tasks, kills, seed=1) == kills
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    digests = {name: merged(tmp_path / name) for name in ("one", "killed")}
    print(f"{images} images, {kills} kills: {digests}")
    assert digests["one"] == digests["killed"]
