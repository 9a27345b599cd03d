"""The perceptual term: its value, its gradient, and the files it takes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mvar.errors import MvarError, TokenizerError
from mvar.tokenizer.training.losses import Reconstruction
from mvar.tokenizer.training.perceptual import STAGES, Perceptual
from tests.tiny_tokenizers import tiny_config, vgg_weights, write_vgg


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def compare(seen: Perceptual, images: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    return seen(Reconstruction(images, reconstructed, None))  # type: ignore[arg-type]  # It looks at pictures only.


def head_weights(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    widths = [width * min(2**stage, 8) for stage in range(5)]
    return {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for k, w in enumerate(widths)}


def by_hand(images: torch.Tensor, reconstructed: torch.Tensor, heads: dict[str, torch.Tensor] | None) -> float:
    """LPIPS's formula in float64, read off the paper: layers in a list, unit vectors by F.normalize."""
    weights = {name: value.double() for name, value in vgg_weights(4).items()}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.cat([images, reconstructed]).double()
    x = (x * 0.5 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    total = 0.0
    for k, numbers in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        x = F.max_pool2d(x, 2) if k else x
        for n in numbers:
            x = F.conv2d(x, weights[f"features.{n}.weight"], weights[f"features.{n}.bias"], padding=1).clamp(min=0)
        a, b = F.normalize(x, dim=1, eps=1e-4).chunk(2)
        head = torch.ones(x.shape[1]) if heads is None else heads[f"lin{k}.model.1.weight"].flatten()
        total += torch.einsum("nchw,c->nhw", (a - b) ** 2, head.double()).mean().item()
    return total


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_heads", [False, True])
def test_the_distance_is_the_papers(tmp_path, suffix, with_heads):
    heads = head_weights(4) if with_heads else None
    if heads is not None:
        save_file(heads, tmp_path / "heads.safetensors")
    backbone = write_vgg(tmp_path / f"vgg{suffix}", width=4)
    seen = Perceptual(backbone, tmp_path / "heads.safetensors" if with_heads else None)
    images, reconstructed = pictures(0), pictures(1)
    expected = by_hand(images, reconstructed, heads)
    assert expected > 0.01
    assert compare(seen, images, reconstructed).item() == pytest.approx(expected, rel=1e-5)


def test_equal_pictures_have_no_distance(tmp_path):
    seen = Perceptual(write_vgg(tmp_path / "vgg.pth"))
    assert compare(seen, pictures(0), pictures(0)).item() == 0
    assert compare(seen, pictures(0), pictures(0) + 0.01).item() > 0


def test_gradients_reach_the_reconstructed_pictures_only_and_shrink_the_distance(tmp_path):
    seen = Perceptual(write_vgg(tmp_path / "vgg.pth"))
    images, reconstructed = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    before = compare(seen, images, reconstructed)
    before.backward()
    assert images.grad is None
    assert all(parameter.grad is None for parameter in seen.parameters())
    assert reconstructed.grad is not None and reconstructed.grad.isfinite().all()
    after = compare(seen, images, reconstructed - 1e-3 * reconstructed.grad / reconstructed.grad.abs().max())
    assert after < before


def test_places_where_nothing_fires_have_finite_gradients(tmp_path):
    weights = {name: value * 0 for name, value in vgg_weights(2).items()}  # every map is zero everywhere
    save_file(weights, tmp_path / "zero.safetensors")
    reconstructed = pictures(1).requires_grad_()
    distance = compare(Perceptual(tmp_path / "zero.safetensors"), pictures(0), reconstructed)
    distance.backward()
    assert distance.item() == 0
    assert reconstructed.grad is not None and reconstructed.grad.isfinite().all()


def test_the_real_layout_has_thirteen_convolutions_in_torchvisions_places():
    """features: 2, 2, 3, 3, 3 convolutions, each with a ReLU after it, each stage with a maximum."""
    places, place = [], 0
    for count in (2, 2, 3, 3, 3):
        places.append(tuple(range(place, place + 2 * count, 2)))
        place += 2 * count + 1
    assert tuple(places) == STAGES


def broken(case: str, folder: Path) -> Path:
    path = folder / f"{case}.safetensors"
    weights = vgg_weights()
    if case == "missing":
        return path
    if case == "garbage":
        path.write_bytes(b"\0" * 50)
        return path
    if case == "pickle":
        path = folder / "pickle.pth"
        torch.save({"features.0.weight": Path("/")}, path)  # an object, which must not be made
        return path
    if case == "another":
        weights = {"conv1.weight": torch.zeros(1)}
    if case == "cut":
        del weights["features.28.bias"]
    if case == "five":
        weights["features.0.weight"] = torch.zeros(8, 3, 5, 5)
    if case == "chain":
        weights["features.5.weight"] = torch.zeros(16, 3, 3, 3)
    if case == "nan":
        weights["features.7.bias"][0] = float("nan")
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "not found"),
        ("garbage", "damaged: not readable"),
        ("pickle", "damaged: not readable as a file of weights"),
        ("another", r"lacks features\.0\.weight .*conv1\.weight"),
        ("cut", r"lacks features\.28\.bias"),
        ("five", r"features\.0 has shapes \[8, 3, 5, 5\]"),
        ("chain", r"features\.5\.weight takes 3 channels, expected 8"),
        ("nan", r"features\.7\.bias holds values that are not finite"),
    ],
)
def test_a_file_that_is_no_backbone_is_refused(tmp_path, case, message):
    with pytest.raises(TokenizerError, match=f"perceptual backbone .*{message}"):
        Perceptual(broken(case, tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin3.model.1.weight": None}, r"lin3\.model\.1\.weight: got nothing, expected shape \[1, 64, 1, 1\]"),
        ({"lin0.model.1.weight": torch.zeros(1, 9, 1, 1)}, r"got shape \[1, 9, 1, 1\], expected shape \[1, 8, 1, 1\]"),
        ({"lin1.model.1.weight": -torch.ones(1, 16, 1, 1)}, "entries below zero"),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path, change, message):
    heads = {name: value for name, value in (head_weights(8) | change).items() if value is not None}
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(TokenizerError, match=f"perceptual heads .*{message}"):
        Perceptual(write_vgg(tmp_path / "vgg.pth"), tmp_path / "heads.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"perceptual": 1.0}}, "perceptual_backbone names no file"),
        ({"loss": {"adversarial": 1.0, "l1": 0, "l2": 0}}, "adversarial needs another term that compares pictures"),
        ({"loss": {"adversarial": 1.0, "adversarial_layers": 3}}, "3 halvings leave nothing of pictures of 16 px"),
        (
            {"loss": {"perceptual": 1.0, "perceptual_backbone": "x"}, "geometry": {"patch_nums": (1, 2), "channels": 8,
             "channel_mult": (1, 2)}},
            "pictures of 4 px are too small",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(changes, message):
    from pydantic import ValidationError

    with pytest.raises((ValidationError, MvarError), match=message):
        tiny_config(**changes)
