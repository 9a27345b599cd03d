"""`mvar sample` as a user runs it: what is drawn, how it is named, and what is refused. Jobs: test_sample_jobs.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mvar.cli import main as mvar
from mvar.images.sources import ImageFolder
from mvar.sampling.job import RECORD
from mvar.testing.tiny_pairs import CLASSES, PYRAMID, write_pair
from mvar.tokenizer.files import save_tokenizer
from mvar.tokenizer.vqvae import VQVAE


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name the weights and the tokenizer."""
    return write_pair(tmp_path_factory.mktemp("model"))


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
    assert list(images(out)) == [f"{label:04d}/{number:05d}.png" for label in (0, 2, 3) for number in range(2)]
    first = pixels(out / "0000/00000.png")
    assert first.shape == (8, 8, 3)
    whole = pixels(sheet)
    assert whole.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3)
    assert np.array_equal(whole[:8, :8], first)
    assert np.array_equal(whole[10:18, 10:18], pixels(out / "0002/00001.png"))
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


def test_an_image_is_its_class_and_number_whatever_else_is_drawn(places: list[str], tmp_path: Path) -> None:
    few, many, counted = tmp_path / "few", tmp_path / "many", tmp_path / "counted"
    assert draw(places, "--classes", "1", "--per-class", "2", "--out", str(few)) == 0
    assert draw(places, "--num", "14", "--batch", "5", "--out", str(many)) == 0
    assert draw(places, "--classes", "3,1", "--per-class", "2,1", "--out", str(counted)) == 0
    assert images(many).items() >= images(few).items()
    assert images(many).items() >= images(counted).items()
    # 14 over 4 classes: the first two have one more.
    assert [len(list((many / f"{label:04d}").iterdir())) for label in range(CLASSES)] == [4, 4, 3, 3]
    assert [len(list((counted / f"{label:04d}").iterdir())) for label in (1, 3)] == [1, 2]


def test_seed_and_settings_change_the_images(places: list[str], tmp_path: Path) -> None:
    found = []
    for name, options in (
        ("plain", []),
        ("seed", ["--seed", "1"]),
        ("cfg", ["--cfg", "6"]),
        ("constant", ["--cfg", "6", "--guidance", "constant"]),
        ("interval", ["--cfg", "6", "--guidance", "constant", "--cfg-scales", "0-1"]),
        ("hot", ["--temperature", "3"]),
        ("top_p", ["--top-p", "0.1,0.1,0.5"]),
        ("greedy", ["--top-k", "1"]),
        ("smooth", ["--smooth"]),
    ):
        assert draw(places, "--classes", "0", "--per-class", "1", "--out", str(tmp_path / name), *options) == 0
        found.append(images(tmp_path / name)["0000/00000.png"])
    assert len(set(found)) == 9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_images_too(places: list[str], tmp_path: Path, precision: str) -> None:
    assert draw(places, "--per-class", "1", "--precision", precision, "--out", str(tmp_path)) == 0
    assert len(images(tmp_path)) == CLASSES
    assert json.loads((tmp_path / RECORD).read_text())["precision"] == precision


def test_calibration_tells_how_far_each_precision_is(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(places, "--calibrate", "--num", "6", "--json", str(tmp_path / "figures.json")) == 0
    said = capsys.readouterr().out
    assert "distance from fp32 over 6 images" in said and "bf16" in said and "fp16" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    bf16, fp16 = figures["context"]["distances"]
    assert bf16["precision"] == "bf16" and len(bf16["divergence_S"]) == len(PYRAMID)
    # Eight bits of a factor against eleven: sixty-four times in the divergence, which is of second order.
    assert 0 < sum(fp16["divergence_S"]) < sum(bf16["divergence_S"]) / 8 < 1
    assert 0 <= fp16["differing"] <= bf16["differing"] < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_a_grid_has_a_bound_on_both_sides(places: list[str], tmp_path: Path) -> None:
    sheet = tmp_path / "grid.png"
    bounds = ("--grid-classes", "2", "--grid-per-class", "3")
    assert draw(places, "--num", "40", "--out", str(tmp_path / "out"), "--grid", str(sheet), *bounds) == 0
    assert pixels(sheet).shape == (2 * 8 + 2, 3 * 8 + 2 * 2, 3)
    assert np.array_equal(pixels(sheet)[10:18, :8], pixels(tmp_path / "out/0003/00000.png"))


def test_grid_alone_writes_nothing_else(places: list[str], tmp_path: Path) -> None:
    sheet = tmp_path / "grid.png"
    assert draw(places, "--per-class", "2", "--no-images", "--grid", str(sheet)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_the_grid_waits_for_the_last_task(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--per-class", "1", "--out", str(tmp_path / "out"), "--grid", str(tmp_path / "grid.png"), "--tasks", "2"]
    options += ["--part", "2"]
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
        (["--per-class", "1,2"], "2 numbers for 4 classes"),
        (["--per-class", "balanced"], "Give --num"),
        (["--per-class", "2", "--num", "9"], "makes 8 images"),
        (["--num", "0"], "from 1"),
        (["--batch", "0"], "whole numbers from 1"),
        (["--cfg", "1,2"], "a table of 2 values, but the model has 3 scales"),
        (["--cfg", "much"], "--cfg much: expected a number"),
        (["--cfg-scales", "1-3"], "the model's scales are 0 to 2"),
        (["--cfg-scales", "2-1"], "expected first and last scale"),
        (["--cfg", "1,2,3", "--guidance", "constant"], "Leave one out"),
        (["--temperature", "0"], "expected more than 0"),
        (["--precision", "tf32"], "needs an NVIDIA GPU"),
        (["--merge", "all.zip"], "must end in .npz"),
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
    assert json.loads((tmp_path / RECORD).read_text())["options"]["cfg"] == 1.5
    assert draw(places, "--per-class", "2", "--cfg", "2", "--seed", "9", "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "counts.0: the folder has 1, this command 2" in said and "options.cfg: the folder has 1.5, this" in said
    assert len(images(tmp_path)) == CLASSES


def test_the_module_runs_as_a_command(places: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mvar.sample", *places, "--classes", "9", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mvar: error: --classes 9")
