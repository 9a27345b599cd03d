"""`mvar evaluate-tokenizer` on a small store: figures against those computed by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.finalize import finalize
from data_prep.job import TokenizeConfig
from data_prep.tokenize import tokenize
from mvar.cli import run_command
from mvar.evaluate_tokenizer import main as evaluate_tokenizer
from mvar.evaluation.fidelity import frechet_distance
from mvar.images.arrays import from_uint8, to_uint8
from mvar.images.sources import ImageFolder
from mvar.images.views import centre_view
from mvar.settings import load
from mvar.testing.extractors import write_extractor
from mvar.tokenizer.files import load_tokenizer
from tests.stores import SIZE_PX, VOCAB, image_folder, tiny_tokenizer


class Perceptual(torch.nn.Module):
    """What LPIPS' file looks like from outside."""

    def forward(self, images: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        assert return_lpips and not resize_images
        return images.float().mean(dim=1).flatten(1) / 255


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate_tokenizer")
    image_folder(root / "images", per_class=16)
    keys = [f"source={root}/images", f"tokenizer={tiny_tokenizer(root / 'tokenizer.safetensors')}"]
    keys += [f"store={root}/codes", "val_fraction=0.4", "workers=0", "device=cpu", "threads=1"]
    tokenize(load(TokenizeConfig, None, keys))
    finalize(root / "codes")
    write_extractor(root / "small.pt")
    torch.jit.script(Perceptual()).save(str(root / "lpips.pt"))
    return root


def arguments(root: Path, *more: object) -> list[str]:
    places = ("--tokenizer", root / "tokenizer.safetensors", "--store", root / "codes", "--images", root / "images")
    return [*map(str, (*places, "--device", "cpu", *more))]


def test_figures_of_held_out_images_are_those_by_hand(root: Path) -> None:
    out = root / "out.json"
    options = ("--features", root / "small.pt", "--lpips", root / "lpips.pt", "--json", out, "--batch", 5)
    assert evaluate_tokenizer(arguments(root, *options)) == 0
    tree: dict[str, Any] = json.loads(out.read_text())
    figures = tree["figures"]

    folder = ImageFolder(root / "images", val_fraction=0.4)
    images = np.stack([centre_view(folder.reader(item.path), SIZE_PX) for item in folder.splits["val"]])
    tokenizer = load_tokenizer(root / "tokenizer.safetensors")
    with torch.no_grad():
        codes = tokenizer.encode(from_uint8(images))
        again = tokenizer.decode(codes).clamp(-1, 1)
    assert tree["context"]["images"] == len(images) and len(images) < len(folder.splits["train"])
    mse = (again - from_uint8(images)).double().square().mean(dim=(1, 2, 3))
    assert figures["psnr_db"] == pytest.approx(float((10 * (4 / mse).log10()).mean()), rel=1e-5)
    finest = torch.bincount(codes[:, 5:].flatten(), minlength=VOCAB).double()
    shares = finest[finest > 0] / finest.sum()
    assert figures["words_scale_3"] == len(shares)
    assert figures["entropy_bits_scale_3"] == pytest.approx(float(-(shares * shares.log2()).sum()), rel=1e-9)
    network = torch.jit.load(str(root / "small.pt"))
    sets = [torch.from_numpy(pictures).permute(0, 3, 1, 2) for pictures in (to_uint8(again), images)]
    features = [network(pictures, return_features=True) for pictures in sets]
    assert figures["rfd"] == pytest.approx(frechet_distance(*features), rel=1e-5)
    gaps = (sets[0].double().mean(dim=1) - sets[1].double().mean(dim=1)) / 255
    assert figures["lpips"] == pytest.approx(float(gaps.square().sum(dim=(1, 2)).mean()), rel=1e-5)


def test_another_tokenizer_than_the_stores_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny_tokenizer(root / "other.safetensors", seed=1)
    assert run_command(evaluate_tokenizer, arguments(root, "--tokenizer", other, "--features", root / "small.pt")) == 2
    assert "not the one that made the codes" in capsys.readouterr().err


def test_a_wrong_lpips_file_is_one_message(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("--features", root / "small.pt", "--lpips", root / "small.pt")
    assert run_command(evaluate_tokenizer, arguments(root, *wrong)) == 2
    assert "--lpips" in capsys.readouterr().err
