"""`mvar evaluate --classifier` on pictures whose quality is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from mvar.errors import MvarError
from mvar.evaluate import main as evaluate
from mvar.images.arrays import save_png


def _picture(label: int, rng: np.random.Generator) -> np.ndarray:
    """Two easy classes: a bright bar, lying or standing, somewhere on a dark field."""
    image = rng.integers(0, 40, (16, 16, 3), dtype=np.uint8)
    place = int(rng.integers(2, 12))
    if label:
        image[:, place : place + 3] = 220
    else:
        image[place : place + 3] = 220
    return image


def _folder(root: Path, names: list[str], count: int, seed: int, *, swap: bool = False) -> None:
    rng = np.random.default_rng(seed)
    for label, name in enumerate(names):
        for index in range(count):
            save_png(root / name / f"{index:03}.png", _picture(1 - label if swap else label, rng))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    _folder(root / "images/train", ["lying", "standing"], 64, seed=0)
    _folder(root / "images/val", ["lying", "standing"], 20, seed=1)
    return root


def _run(real: Path, samples: Path) -> dict[str, float]:
    out = real / f"{samples.name}.json"
    places = ["--samples", str(samples), "--images", str(real / "images"), "--size", "16", "--resize", "1"]
    options = ["--classifier", str(real / "classifier.safetensors"), "--epochs", "12", "--json", str(out)]
    assert evaluate([*places, *options]) == 0
    figures: dict[str, float] = json.loads(out.read_text())["figures"]
    return figures


def test_good_samples_score_like_real_images_and_wrong_ones_do_not(real: Path) -> None:
    _folder(real / "good", ["0", "1"], 20, seed=2)
    _folder(real / "swapped", ["0", "1"], 20, seed=2, swap=True)
    good, swapped = _run(real, real / "good"), _run(real, real / "swapped")
    assert good["classifier_accuracy_real"] > 0.9
    assert good["classifier_accuracy_samples"] > 0.9
    assert swapped["classifier_accuracy_samples"] < 0.1
    assert good["frechet_samples"] < 5 * good["frechet_floor"] + 0.1


def test_noise_is_far_from_real_images(real: Path) -> None:
    rng = np.random.default_rng(3)
    for label in range(2):
        for index in range(20):
            save_png(real / f"noise/{label}/{index}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    figures = _run(real, real / "noise")
    assert figures["frechet_samples"] > 5 * figures["frechet_floor"]
    assert figures["precision_samples"] < figures["precision_floor"]


def test_samples_of_other_classes_are_refused(real: Path) -> None:
    _folder(real / "named", ["cat", "dog"], 2, seed=0)
    _folder(real / "many", ["0", "7"], 2, seed=0)
    for folder, message in (("named", "class numbers"), ("many", "2 classes")):
        with pytest.raises(MvarError, match=message):
            _run(real, real / folder)
