"""The life of a tokenizer's training with every term of the loss: processes that end, folders that are shared."""

import contextlib
import json
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from mvar.cli import main
from mvar.run.folder import RunFolder
from mvar.testing.ranks import Ranks
from mvar.tokenizer.files import sha256_of
from tests.tiny_tokenizers import write_pictures, write_vgg

STEPS = 24
SETTINGS = [
    "geometry.channels=8",
    "geometry.channel_mult=[1,2,2]",
    "geometry.res_blocks=1",
    "geometry.latent_channels=4",
    "geometry.vocab_size=24",
    "geometry.patch_nums=[1,2,4]",
    "loss.perceptual=0.05",
    "loss.adversarial=0.2",
    "loss.adversarial_start=4",
    "loss.adversarial_channels=8",
    "loss.adversarial_layers=2",
    f"steps={STEPS}",
    "batch=5",
    "lr=3e-3",
    "warmup_steps=2",
    "revive_every=3",
    "revive_below=0.5",
    "usage_decay=0.5",
    "ema_decay=0.8",
    "scale_dropout=0.2",
    "precision=fp32",
    "device=cpu",
    "threads=1",
    "log_every=1",
    "save_every=6",
    "validate_every=8",
    "val_fraction=0.2",
    "watchdog_s=0",
]
OUTPUTS = ("tokenizer.safetensors", "state.safetensors", "reconstructions.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_pictures(folder / "images", side=20)
    write_vgg(folder / "vgg.safetensors")
    return folder


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """A training of two processes that nobody disturbed."""
    out = tmp_path_factory.mktemp("finished")
    job = start(files, out, 2)
    assert job.wait() == [0, 0], job.output()
    return out


def words(files: Path, out: Path, *more: str) -> list[str]:
    own = [f"images={files / 'images'}", f"loss.perceptual_backbone={files / 'vgg.safetensors'}", f"out={out}"]
    return [*own, *SETTINGS, *more]


def start(files: Path, out: Path, ranks: int, *more: str) -> Ranks:
    command = ["mvar.train_tokenizer", words(files, out, *more)]
    return Ranks("mvar.testing.ranks:command", command, ranks, out.parent / f"{out.name}-logs")


def run(files: Path, out: Path, *more: str) -> int:
    """One process: this one."""
    threads = torch.get_num_threads()
    try:
        return main(["train-tokenizer", *words(files, out, *more)])
    finally:
        torch.set_num_threads(threads)


def records(out: Path, kind: str) -> list[dict]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if record["kind"] == kind]


def wait_for_step(job: Ranks, out: Path, step: int) -> None:
    while job.alive() and not any(record["step"] >= step for record in records(out, "train")):
        time.sleep(0.005)
    assert job.alive(), job.output()


def assert_same(out: Path, finished: Path) -> None:
    for name in OUTPUTS:
        assert sha256_of(out / name) == sha256_of(finished / name), name
    for kind in ("train", "val"):
        timed = ("imgs_per_s", "wait_share")
        ours, theirs = (
            [{k: v for k, v in r.items() if k not in timed} for r in records(o, kind)] for o in (out, finished)
        )
        assert ours == theirs


def test_a_training_with_all_terms_gets_better_on_pictures_it_has_not_seen(finished):
    validations = records(finished, "val")
    assert [record["step"] for record in validations] == [8, 16, STEPS]
    assert validations[-1]["psnr_db"] > validations[0]["psnr_db"]
    assert validations[-1]["l1"] < validations[0]["l1"]
    assert all(-1 <= record["ssim"] <= 1 for record in validations)  # Too short a training to better structure.
    assert len(validations[-1]["psnr_db_per_scale"]) == 3
    steps = records(finished, "train")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert ["discriminator_loss" in record for record in steps] == [False] * 4 + [True] * (STEPS - 4)
    assert all(record["perceptual"] > 0 for record in steps)
    assert sum(record["revived"] for record in steps) > 0
    drawn = [record["file"] for record in records(finished, "sample")]
    assert len(drawn) == 3 and all((finished / name).is_file() for name in drawn)
    assert not list(finished.glob(".*"))


def test_killed_processes_go_on_bit_by_bit(files, finished, tmp_path):
    out = tmp_path / "out"
    for kill_at in (3, 9, 20):  # before the first saved state, before and after the second validation
        job = start(files, out, 2)
        wait_for_step(job, out, kill_at)
        job.kill()
    (out / ".state.safetensors.123.tmp").write_bytes(b"half a state")
    job = start(files, out, 2)
    assert job.wait() == [0, 0], job.output()
    assert "resuming after step" in job.output()
    assert_same(out, finished)
    assert not list(out.glob(".*"))


def test_a_signal_to_one_rank_and_a_stop_file_stop_all_and_lose_nothing(files, finished, tmp_path):
    out = tmp_path / "out"
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR1, 0)):
        job = start(files, out, 2)
        wait_for_step(job, out, len(records(out, "train")) + 2)
        job.send(number, rank)
        assert job.wait() == [75, 75], job.output()
        assert "run the same command to go on" in job.output()
    before = len(records(out, "train"))
    (out / "STOP").touch()
    job = start(files, out, 2)
    assert job.wait() == [75, 75], job.output()
    assert not (out / "STOP").exists()
    assert len(records(out, "train")) == before + 1
    job = start(files, out, 2)
    assert job.wait() == [0, 0], job.output()
    assert_same(out, finished)


def test_another_number_of_processes_goes_on_with_the_same_training(files, tmp_path):
    out = tmp_path / "out"
    (out).mkdir()
    (out / "STOP").touch()
    assert run(files, out) == 75
    (out / "STOP").touch()
    job = start(files, out, 2)
    assert job.wait() == [75, 75], job.output()
    assert "resuming after step 1" in job.output()
    assert [record["step"] for record in records(out, "train")] == [1, 2]
    assert run(files, out) == 0
    assert [record["step"] for record in records(out, "train")] == list(range(1, STEPS + 1))


def test_a_folder_that_is_being_trained_in_is_refused(files, tmp_path, capsys):
    with RunFolder(tmp_path / "out").claimed(90):
        assert run(files, tmp_path / "out") == 2
    assert "is training in it" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_damaged_newest_state_falls_back_to_the_one_before(files, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "tokenizer.safetensors").unlink()
    data = bytearray((out / "state.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "state.safetensors").write_bytes(data)
    job = start(files, out, 2)
    assert job.wait() == [0, 0], job.output()
    assert "WARNING: training state" in job.output()
    assert "Going on from the one before it, state-before.safetensors, step 18" in job.output()
    assert_same(out, finished)
    # The damaged one was not kept as the one before.
    (out / "state.safetensors").write_bytes(b"")
    (out / "tokenizer.safetensors").unlink()
    job = start(files, out, 2)
    assert job.wait() == [0, 0], job.output()
    assert_same(out, finished)


def test_an_image_that_one_rank_cannot_read_stops_all_with_its_name(files, tmp_path):
    shutil.copytree(files / "images", tmp_path / "images")
    bad = tmp_path / "images" / "spots" / "3.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    shutil.copy(files / "vgg.safetensors", tmp_path)
    job = start(tmp_path, tmp_path / "out", 2, "val_fraction=0")
    assert job.wait() == [2, 2], job.output()
    assert str(bad) in job.output()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loss.perceptual_backbone=/nowhere.pth", "perceptual backbone /nowhere.pth: not found"),
        ("loss.perceptual_backbone=null", "perceptual_backbone names no file"),
        ("loss.perceptual_heads=/nowhere.pth", "perceptual heads /nowhere.pth: not found"),
        ("loss.adversarial_layers=4", "4 halvings leave nothing of pictures of 16 px"),
    ],
)
def test_wrong_files_and_settings_end_before_anything_is_trained(files, tmp_path, capsys, setting, message):
    assert run(files, tmp_path / "out", setting) == 2
    error = capsys.readouterr().err
    assert error.startswith("mvar: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_two_ranks_name_a_wrong_file_once(files, tmp_path):
    job = start(files, tmp_path / "out", 2, "loss.perceptual_backbone=/nowhere.pth")
    assert job.wait() == [2, 2], job.output()
    assert job.output().count("perceptual backbone /nowhere.pth: not found") == 1


def test_a_backbone_that_was_exchanged_is_another_training(files, finished, tmp_path, capsys):
    other = write_vgg(tmp_path / "vgg.pth", seed=5)
    assert run(files, finished, f"loss.perceptual_backbone={other}") == 2
    assert "loss.perceptual_backbone: " in capsys.readouterr().err


def test_lists_and_tars_are_sources_too(files, tmp_path):
    pictures = sorted((files / "images").rglob("*.png"))
    lines = [f"{path},{path.parent.name}" for path in pictures]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as tar:
        for number, path in enumerate(pictures):
            tar.add(path, f"{number:03}.png")
            label = tmp_path / "label"
            label.write_text(str(int(path.parent.name == "spots")))
            tar.add(label, f"{number:03}.cls")
    few = ["steps=2", "loss.adversarial_start=0", "validate_every=0"]
    for number, source in enumerate(("list.csv", "tars")):
        out = tmp_path / f"out{number}"
        assert run(files, out, f"images={tmp_path / source}", *few) == 0
        assert (out / "tokenizer.safetensors").is_file()
        assert len(records(out, "train")) == 2


def test_measurements_reach_tensorboard(files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(files, tmp_path / "out", "steps=2", "loss.adversarial_start=0", "tensorboard=true") == 0
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert {"train/perceptual", "train/discriminator_loss", "val/psnr_db", "val/perplexity_per_scale/03"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["samples"]
    assert sys.modules.get("wandb") is None or not (tmp_path / "out" / "wandb").exists()
