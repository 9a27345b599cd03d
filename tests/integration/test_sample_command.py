"""`mvar sample` as a user runs it: folders of images that do not depend on how the job was cut up or interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mvar import sample
from mvar.cli import main as mvar
from mvar.config import ModelConfig
from mvar.files.disk import host_name
from mvar.images.sources import ImageFolder
from mvar.model.init import init_weights_
from mvar.model.transformer import MVAR
from mvar.tokenizer.files import save_tokenizer
from mvar.tokenizer.vqvae import VQVAE
from tests.exports import save_weights

PYRAMID = (1, 2, 4)
CLASSES = 4


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the weights and the tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        depth=2, width=64, heads=2, num_classes=CLASSES, patch_nums=PYRAMID, vocab_size=32, latent_channels=4
    )
    model = MVAR.from_config(config, num_classes=CLASSES)
    init_weights_(model, 0, ModelConfig(init_gamma=1.0, init_head=2.0, init_conditioning=1.0))
    save_weights(folder / "model.safetensors", config, model.state_dict())
    torch.manual_seed(0)
    save_tokenizer(folder / "tokenizer.safetensors", VQVAE(32, 4, 32, PYRAMID, channel_mult=(1, 1), res_blocks=1))
    return ["--weights", str(folder / "model.safetensors"), "--tokenizer", str(folder / "tokenizer.safetensors")]


def draw(places: list[str], *options: str) -> int:
    return mvar(["sample", *places, "--device", "cpu", *options])


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_and_grid_are_named_and_laid_out_by_class(places: list[str], tmp_path: Path) -> None:
    out, sheet = tmp_path / "samples", tmp_path / "report/grid.png"
    assert draw(places, "--classes", "0,2-3", "--per-class", "2", "--out", str(out), "--grid", str(sheet)) == 0
    assert list(images(out)) == [f"{label}/{number:05d}.png" for label in (0, 2, 3) for number in range(2)]
    first = pixels(out / "0/00000.png")
    assert first.shape == (8, 8, 3)
    whole = pixels(sheet)
    assert whole.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3)
    assert np.array_equal(whole[:8, :8], first)
    assert np.array_equal(whole[10:18, 10:18], pixels(out / "2/00001.png"))
    assert len(set(images(out).values())) == 6, "six different images"
    assert len(ImageFolder(out).splits["train"]) == 6, "an image folder like any other"


def test_classes_by_name_are_those_by_number(places: list[str], tmp_path: Path) -> None:
    names, numbers, named = tmp_path / "names.txt", tmp_path / "numbers", tmp_path / "named"
    names.write_text("cat\ndog\nbird\nfish\n")
    assert draw(places, "--classes", "3,1", "--per-class", "1", "--out", str(numbers)) == 0
    by_name = ("--classes", "fish,dog", "--class-names", str(names), "--per-class", "1")
    assert draw(places, *by_name, "--out", str(named)) == 0
    assert images(named) == images(numbers)
    assert json.loads((named / "sample.json").read_text())["classes"] == ["cat", "dog", "bird", "fish"]
    assert draw(places, *by_name, "--out", str(numbers)) == 0  # Names are no setting that makes another folder.


def test_tasks_batches_and_interruptions_do_not_change_the_folder(places: list[str], tmp_path: Path) -> None:
    whole, parts, batched = tmp_path / "whole", tmp_path / "parts", tmp_path / "batched"
    assert draw(places, "--per-class", "3", "--out", str(whole)) == 0
    for task in range(3):
        assert draw(places, "--per-class", "3", "--out", str(parts), "--tasks", "3", "--task", str(task)) == 0
    assert draw(places, "--per-class", "3", "--out", str(batched), "--batch", "5") == 0
    assert images(whole) == images(parts) == images(batched)

    # As after a kill: some images gone, one left half-written under its temporary name.
    expected = images(whole)
    (whole / "1/00002.png").unlink()
    (whole / "3/00000.png").unlink()
    (whole / f"3/.00000.png~{host_name()}~123~00000000.tmp").write_bytes(b"half")
    untouched = (whole / "2/00001.png").stat().st_mtime_ns
    assert draw(places, "--per-class", "3", "--out", str(whole)) == 0
    assert images(whole) == expected
    assert (whole / "2/00001.png").stat().st_mtime_ns == untouched
    assert not list(whole.rglob("*.tmp"))


def test_more_images_of_a_class_keep_those_that_exist(places: list[str], tmp_path: Path) -> None:
    assert draw(places, "--classes", "1", "--per-class", "2", "--out", str(tmp_path)) == 0
    two = images(tmp_path)
    assert draw(places, "--classes", "1,3", "--per-class", "4", "--out", str(tmp_path)) == 0
    assert images(tmp_path).items() >= two.items()
    assert len(images(tmp_path)) == 8


def test_seed_and_settings_change_the_images(places: list[str], tmp_path: Path) -> None:
    found = []
    for name, options in (
        ("plain", []),
        ("seed", ["--seed", "1"]),
        ("cfg", ["--cfg", "6"]),
        ("greedy", ["--top-k", "1"]),
        ("smooth", ["--smooth"]),
    ):
        assert draw(places, "--classes", "0", "--per-class", "1", "--out", str(tmp_path / name), *options) == 0
        found.append(images(tmp_path / name)["0/00000.png"])
    assert len(set(found)) == 5


def test_bf16_draws_images_too(places: list[str], tmp_path: Path) -> None:
    assert draw(places, "--per-class", "1", "--precision", "bf16", "--out", str(tmp_path)) == 0
    assert len(images(tmp_path)) == CLASSES


def test_grid_alone_writes_nothing_else(places: list[str], tmp_path: Path) -> None:
    sheet = tmp_path / "grid.png"
    assert draw(places, "--per-class", "2", "--no-images", "--grid", str(sheet)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_the_grid_waits_for_the_last_task(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--per-class", "1", "--out", str(tmp_path / "out"), "--grid", str(tmp_path / "grid.png"), "--tasks", "2"]
    assert draw(places, *options, "--task", "1") == 0
    assert "left to the task that ends last" in capsys.readouterr().out
    assert not (tmp_path / "grid.png").exists()
    assert draw(places, *options, "--task", "0") == 0
    assert (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "4"], "not within 0-3"),
        (["--classes", "3-1"], "not within 0-3"),
        (["--classes", "cat"], "cannot read 'cat'"),
        (["--per-class", "0"], "whole numbers from 1"),
        (["--tasks", "2", "--task", "2"], "from 0 to 1"),
        (["--top-p", "1.5"], "0 to 1"),
        (["--device", "abacus"], "unknown"),
        (["--grid", "grid.jpg"], "must end in .png"),
        (["--no-images"], "needs --grid"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--tokenizer", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_mistakes_give_one_message_and_write_nothing(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert mvar(["sample", *places, "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_tokenizer_of_another_geometry_is_refused(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_tokenizer(other, VQVAE(32, 4, 64, PYRAMID, channel_mult=(1, 1), res_blocks=1))
    assert draw(places, "--tokenizer", str(other), "--out", str(tmp_path / "out")) == 2
    assert "vocab_size is 32 in the model and 64 in the tokenizer" in capsys.readouterr().err


def test_images_drawn_otherwise_are_not_mixed_in(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(places, "--per-class", "1", "--out", str(tmp_path)) == 0
    assert json.loads((tmp_path / sample.RECORD).read_text())["cfg"] == 1.5
    assert draw(places, "--per-class", "2", "--cfg", "2", "--seed", "9", "--out", str(tmp_path)) == 2
    assert "drawn with other seed, cfg" in capsys.readouterr().err
    assert len(images(tmp_path)) == CLASSES


def test_the_module_runs_as_a_command(places: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mvar.sample", *places, "--classes", "9", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mvar: error: --classes 9")
