"""`mvar train-tokenizer` as a user runs it: from a folder of images to a tokenizer file, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvar.cli import main
from mvar.run.history import History
from mvar.tokenizer.files import load_tokenizer, sha256_of

STEPS = 40
SETTINGS = [
    "geometry.channels=8",
    "geometry.channel_mult=[1,2]",
    "geometry.res_blocks=1",
    "geometry.latent_channels=4",
    "geometry.vocab_size=16",
    "geometry.patch_nums=[1,2,4]",
    f"steps={STEPS}",
    "batch=4",
    "lr=3e-3",
    "warmup_steps=2",
    "revive_every=3",
    "revive_below=0.5",
    "usage_decay=0.5",
    "ema_decay=0.9",
    "scale_dropout=0.2",
    "precision=fp32",
    "device=cpu",
    "threads=2",
    "log_every=1",
    "save_every=8",
    "validate_every=15",
    "val_fraction=0.2",
    "watchdog_s=0",  # it wants a real stderr
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("bars", "spots"):
        (folder / name).mkdir()
        for number in range(12):
            tile = generator.integers(0, 255, (3, 3, 3) if name == "spots" else (1, 3, 3), dtype=np.uint8)
            Image.fromarray(tile).resize((10, 9)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A training that was never interrupted."""
    out = tmp_path_factory.mktemp("finished")
    assert run(images, out) == 0
    return out


def run(images: Path, out: Path, *more: str) -> int:
    threads = torch.get_num_threads()
    try:
        return main(["train-tokenizer", f"images={images}", f"out={out}", *SETTINGS, *more])
    finally:
        torch.set_num_threads(threads)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(out: Path) -> list[dict]:
    """Records without what depends on the machine's speed."""
    return [{k: v for k, v in record.items() if k not in ("imgs_per_s", "wait_share")} for record in records(out)]


def losses(out: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(out) if record["kind"] == "train"}


def test_a_training_leaves_tokenizer_metrics_and_pictures(finished):
    vqvae = load_tokenizer(finished / "tokenizer.safetensors")
    assert vqvae.image_size == 8
    assert list(losses(finished)) == list(range(1, STEPS + 1))
    validations = [record for record in records(finished) if record["kind"] == "val"]
    assert [record["step"] for record in validations] == [15, 30, STEPS]
    assert {"psnr_db", "ssim", "used_share", "used_per_scale", "perplexity_per_scale"} <= validations[0].keys()
    assert sum(record["revived"] for record in records(finished) if record["kind"] == "train") > 0
    with Image.open(finished / "reconstructions.png") as sheet:
        # Eight columns at most, originals above reconstructions: an even number of rows.
        assert sheet.height // 2 in (2 * 8 + 2, 4 * 8 + 6)
    assert not [name for name in os.listdir(finished) if name.startswith(".")]
    (start,) = History(finished).starts()
    assert (start.begin_step, start.end_step, start.reason) == (0, STEPS, "finished")
    assert History(finished).environment()["device"].startswith("1 x ")


def test_the_same_command_gives_the_same_bytes(images, finished, tmp_path):
    assert run(images, tmp_path) == 0
    for name in ("tokenizer.safetensors", "state.safetensors", "reconstructions.png"):
        assert sha256_of(tmp_path / name) == sha256_of(finished / name), name
    assert untimed(tmp_path) == untimed(finished)


def test_a_finished_training_is_not_run_again(images, finished, capsys):
    before = sha256_of(finished / "metrics.jsonl")
    assert run(images, finished) == 0
    assert "already finished" in capsys.readouterr().out
    assert sha256_of(finished / "metrics.jsonl") == before


def test_a_killed_training_goes_on_exactly(images, finished, tmp_path):
    command = [sys.executable, "-m", "mvar.train_tokenizer", f"images={images}", f"out={tmp_path}", *SETTINGS]
    metrics = tmp_path / "metrics.jsonl"
    for kill_at in (2, 12, 20):  # before the first saved state, then between two
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train"') >= kill_at):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "tokenizer.safetensors").exists()
    with metrics.open("a") as file:
        file.write('{"kind": "tra')  # a line that the kill cut short
    assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0
    assert losses(tmp_path) == losses(finished)
    for name in ("tokenizer.safetensors", "state.safetensors"):
        assert sha256_of(tmp_path / name) == sha256_of(finished / name), name
    assert untimed(tmp_path) == untimed(finished)


def test_a_kill_between_the_last_step_and_the_result_is_made_good(images, finished, tmp_path):
    assert run(images, tmp_path) == 0
    (tmp_path / "tokenizer.safetensors").unlink()
    assert run(images, tmp_path) == 0
    assert sha256_of(tmp_path / "tokenizer.safetensors") == sha256_of(finished / "tokenizer.safetensors")
    assert untimed(tmp_path) == untimed(finished)


def test_settings_that_decide_the_result_may_not_change(images, finished, tmp_path, capsys):
    assert run(images, finished, "lr=1e-3", "geometry.vocab_size=17") == 2
    message = capsys.readouterr().err
    assert "geometry.vocab_size: 16 then, 17 now" in message
    assert "lr: 0.003 then, 0.001 now" in message


def test_a_damaged_state_is_named(images, tmp_path, capsys):
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 100)
    assert run(images, tmp_path) == 2
    assert f"{tmp_path / 'state.safetensors'}: damaged" in capsys.readouterr().err


def test_a_tokenizer_of_unknown_origin_is_not_overwritten(images, finished, tmp_path, capsys):
    (tmp_path / "tokenizer.safetensors").write_bytes((finished / "tokenizer.safetensors").read_bytes())
    assert run(images, tmp_path) == 2
    assert "not the state of its training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate=1", "unknown key; the nearest that exists is"),
        ("geometry.patch_nums=[3,2]", "expected rising positive sides"),
        ("resize=0.5", "resize"),
        ("images=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_2(images, tmp_path, capsys, setting, message):
    assert run(images, tmp_path / "out", setting) == 2
    error = capsys.readouterr().err
    assert error.startswith("mvar: error: ")
    assert message in error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_asked_for_by_name_that_is_not_there(images, tmp_path, capsys):
    assert run(images, tmp_path, "device=cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train-tokenizer", "--help"])
    assert ended.value.code == 0
    assert "geometry.patch_nums" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["tokenizer_32", "tokenizer_64", "tokenizer_256"])
def test_recipes_are_valid_and_of_the_size_they_name(recipe):
    from mvar.settings import load
    from mvar.tokenizer.training.config import TokenizerTrainConfig

    path = Path(__file__).resolve().parents[2] / "recipes" / f"{recipe}.yaml"
    config = load(TokenizerTrainConfig, path, ["images=i", "out=o"])
    assert config.geometry.image_size == int(recipe.removeprefix("tokenizer_"))
