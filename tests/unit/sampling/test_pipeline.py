"""Labels in, pictures out: what a call promises, and how it answers wrong ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvar import MVARPipeline, SamplingOptions
from mvar.errors import CheckpointError, ConfigError, MvarError
from mvar.export import main as export
from mvar.sample import main as sample
from mvar.sampling.pictures import Picture
from mvar.testing.tiny_pairs import write_pair
from mvar.tokenizer.vqvae import VQVAE
from tests.golden import REPOSITORY

NAMES = ("cat", "dog", "7", "twin")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "names").write_text("\n".join(NAMES))
    words = [*write_pair(folder), "--class-names", str(folder / "names"), "--license", "mit", "--cfg", "0,1,2"]
    assert export([*words, "--to", "hub", str(folder / "hub")]) == 0
    return folder / "hub"


@pytest.fixture(scope="module")
def pipe(hub: Path) -> MVARPipeline:
    return MVARPipeline.from_pretrained(hub, device="cpu")


def pixels(pipe: MVARPipeline, *arguments: Any, **options: Any) -> np.ndarray:
    images = pipe(*arguments, output_type="np", **options).images
    assert isinstance(images, np.ndarray)
    return images


def test_pictures_come_in_three_kinds(pipe: MVARPipeline) -> None:
    drawn = pipe([0, "dog", 2], guidance=1.5, seeds=[5, 6, 7])
    assert (drawn.labels, drawn.seeds) == ((0, 1, 2), (5, 6, 7))
    assert isinstance(drawn.images, list) and all(isinstance(image, Image.Image) for image in drawn.images)
    assert drawn.images[0].size == (8, 8)
    array = pixels(pipe, [0, "dog", 2], guidance=1.5, seeds=[5, 6, 7])
    tensor = pipe([0, "dog", 2], guidance=1.5, seeds=[5, 6, 7], output_type="pt").images
    assert array.shape == (3, 8, 8, 3) and array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert isinstance(tensor, torch.Tensor) and torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    pil = np.stack([np.asarray(image) for image in drawn.images])
    assert np.array_equal(pil, (array * 255).round().astype(np.uint8))


def test_an_image_depends_on_label_seed_and_options_and_not_on_its_neighbours(pipe: MVARPipeline) -> None:
    together = pixels(pipe, ["cat", "dog", "cat"], seeds=[3, 4, 9])
    assert np.allclose(pixels(pipe, "dog", seeds=4), together[1:2], atol=1e-5)
    assert np.allclose(pixels(pipe, ["cat", "dog", "cat"], seeds=[3, 4, 9], batch=2), together, atol=1e-5)
    assert not np.allclose(together[0], together[2], atol=1e-2)
    assert not np.allclose(pixels(pipe, "dog", guidance=9.0, seeds=4), together[1:2], atol=1e-2)


def test_one_seed_counts_on_and_none_begins_at_0(pipe: MVARPipeline) -> None:
    assert pipe([0, 0, 1], seeds=10).seeds == (10, 11, 12)
    assert pipe(torch.tensor([0, 1])).seeds == (0, 1)
    assert pipe(range(2), seeds=range(4, 6)).seeds == (4, 5)


def test_what_a_call_leaves_open_is_as_the_folder_says(pipe: MVARPipeline) -> None:
    assert pipe.options == SamplingOptions(cfg=(0.0, 1.0, 2.0))
    assert np.array_equal(pixels(pipe, 1), pixels(pipe, 1, guidance=[0, 1, 2]))
    greedy = pixels(pipe, 1, options=SamplingOptions(cfg=0, top_k=1), seeds=1)
    assert np.array_equal(greedy, pixels(pipe, 1, guidance=0, top_k=1, seeds=2))


def test_the_images_are_those_of_the_command(hub: Path, pipe: MVARPipeline, tmp_path: Path) -> None:
    words = ["--weights", str(hub), "--tokenizer", str(hub / "tokenizer/model.safetensors"), "--classes", "dog,=7"]
    assert sample([*words, "--cfg", "0,1,2", "--per-class", "2", "--out", str(tmp_path / "job")]) == 0
    for label, name in ((1, "dog"), (2, "7")):
        for number in range(2):
            picture = Picture(label, number)
            (image,) = pipe(name, seeds=[picture.seed(0)]).images
            apart = np.asarray(image).astype(int) - np.asarray(Image.open(picture.path(tmp_path / "job"))).astype(int)
            assert np.abs(apart).max() <= 1


def test_a_pipeline_of_parts_is_saved_and_comes_back(pipe: MVARPipeline, tmp_path: Path) -> None:
    other = MVARPipeline(pipe.model, pipe.tokenizer, options=SamplingOptions(cfg=0.25, top_k=7), classes=NAMES)
    other.save_pretrained(tmp_path / "other", license="cc0-1.0")
    again = MVARPipeline.from_pretrained(tmp_path / "other", device="cpu")
    assert again.options == other.options and again.classes == NAMES
    assert np.array_equal(pixels(again, "twin"), pixels(other, "twin"))
    assert "cc0-1.0" in (tmp_path / "other/README.md").read_text()
    pipe.save_pretrained(tmp_path / "same")  # With the licence that it came with.
    assert "## License\n\nmit" in (tmp_path / "same/README.md").read_text()


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        ("bird", {}, "labels: no class is called 'bird'. Names like it"),
        ("Dog", {}, "Names like it: dog"),
        (4, {"guidance": 1.0, "seeds": [1, 2]}, "seeds: got 2 for 1 images"),
        ([0, 5], {}, "labels: got 0 to 5, expected 0 to 3, or 4 for no class"),
        (-1, {}, "labels: got -1"),
        ([], {}, "labels: got none"),
        (0, {"output_type": "jpeg"}, "expected one of pil, np, pt"),
        (0, {"batch": 0}, "batch 0"),
        (0, {"guidance": [1.0, 2.0]}, "a table of 2 values, but the model has 3 scales"),
        (0, {"guidance": float("nan")}, "expected finite numbers"),
    ],
)
def test_wrong_calls_are_explained(pipe: MVARPipeline, labels: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pipe(labels, **options)


def test_names_that_are_not_known_are_asked_for_as_numbers(pipe: MVARPipeline) -> None:
    nameless = MVARPipeline(pipe.model, pipe.tokenizer)
    with pytest.raises(ConfigError, match=r"names of this model's classes are not known. Give numbers from 0 to 3"):
        nameless("dog")
    with pytest.raises(ConfigError, match="2 names, but the model has 4 classes"):
        MVARPipeline(pipe.model, pipe.tokenizer, classes=("a", "b"))
    with pytest.raises(ConfigError, match="do not fit together"):
        MVARPipeline(pipe.model, VQVAE(32, 4, 32, (1, 2, 3), channel_mult=(1, 1), res_blocks=1))


def test_what_is_no_hub_folder_says_how_to_make_one(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for place in (tmp_path / "run", hub.parent / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"mvar export --weights .* --to hub"):
            MVARPipeline.from_pretrained(place)
    with pytest.raises(MvarError, match="--device nowhere"):
        MVARPipeline.from_pretrained(hub, device="nowhere")


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = {"deepspeed", "webdataset", "wandb", "tensorboard", "torchmetrics", "matplotlib", "huggingface_hub"}
sys.meta_path.insert(0, Absent())

from mvar import MVAR, VQVAE, MVARPipeline

pipe = MVARPipeline.from_pretrained(sys.argv[1])
images = pipe(["dog", 2], guidance=1.0, seeds=[0, 1]).images
MVAR.from_pretrained(sys.argv[1]), VQVAE.from_pretrained(sys.argv[1])
print(len(images), sorted(ABSENT & set(sys.modules)))
"""


def test_neither_deepspeed_nor_anything_else_of_a_training_is_needed(hub: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(hub)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout == "2 []\n", done.stderr
