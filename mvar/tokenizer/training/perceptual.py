"""How differently a network sees two pictures: LPIPS (Zhang et al. 2018, arXiv 1801.03924) on VGG-16 (1409.1556).

Weights come from local files; nothing is fetched. A backbone has torchvision's layout: `features.N.weight` and
`features.N.bias` of VGG-16's thirteen 3x3 convolutions, other entries (the classifier) are ignored. Heads have LPIPS's
layout: `lin0.model.1.weight` ... `lin4.model.1.weight`, (1, width, 1, 1), no entry below zero.

Legend: B images, C channels (D of them in one layer), H = W side of a picture, h = w side of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvar.errors import TokenizerError
from mvar.tokenizer.files import read_weights
from mvar.tokenizer.training.losses import Reconstruction

STAGES: tuple[tuple[int, ...], ...] = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Numbers of VGG-16's convolutions in `features`; each has a ReLU after it, each stage but the last a 2x2 maximum.
Compared are the maps at the end of each stage: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's pictures in [0, 1], by colour: what torchvision's weights were trained with."""
NORM_EPS = 1e-8
LAYOUT = "torchvision's VGG-16: features.0.weight, features.0.bias, ... features.28.bias"


class Perceptual(nn.Module):
    """Distance of pictures in [-1, 1] as a frozen network sees them; a term of the loss.

    At the end of each stage the two maps are scaled to length 1 at every place; squared differences are summed over
    channels (weighted by the heads if there are any), averaged over places and images, and summed over the stages.
    Widths are read off the file. The pictures' own maps are computed without gradient. Convolutions run in the caller's
    autocast, the rest in float32. Raises TokenizerError for files that do not fit.
    """

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, backbone: Path, heads: Path | None = None) -> None:
        super().__init__()
        weights = read_weights(backbone, "perceptual backbone")
        width = 3
        stages, widths = [], []
        for numbers in STAGES:
            convolutions = [_convolution(backbone, weights, number) for number in numbers]
            for number, convolution in zip(numbers, convolutions, strict=True):
                if convolution.in_channels != width:
                    raise TokenizerError(
                        f"perceptual backbone {backbone}: features.{number}.weight takes {convolution.in_channels}"
                        f" channels, expected {width}. Give a file of {LAYOUT}."
                    )
                width = convolution.out_channels
            stages.append(nn.ModuleList(convolutions))
            widths.append(width)
        self.stages = nn.ModuleList(stages)
        self.heads = None if heads is None else nn.ParameterList(_heads(heads, widths))
        self.register_buffer("mean_1C11", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_1C11", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, batch: Reconstruction) -> Tensor:
        """A scalar: the mean distance of the images."""
        with torch.no_grad():
            originals = self.maps(batch.images_BCHW)
        distance = batch.reconstructed_BCHW.new_zeros(())
        for stage, (own_BDhw, other_BDhw) in enumerate(
            zip(self.maps(batch.reconstructed_BCHW), originals, strict=True)
        ):
            difference_BDhw = (own_BDhw - other_BDhw).square()
            if self.heads is not None:
                difference_BDhw = difference_BDhw * self.heads[stage]
            distance = distance + difference_BDhw.sum(dim=1).mean()
        return distance

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Pictures in [-1, 1] -> for each stage a map (B, D, h, w), float32, of length 1 at every place."""
        x = ((images_BCHW + 1) / 2 - self.mean_1C11) / self.std_1C11
        found = []
        for number, stage in enumerate(self.stages):
            if number:
                x = F.max_pool2d(x, 2)
            assert isinstance(stage, nn.ModuleList)
            for convolution in stage:
                x = F.relu(convolution(x))
            x_BDhw = x.float()
            # The small number inside the root: at a place where nothing fires the gradient of a bare root is infinite.
            found.append(x_BDhw * torch.rsqrt(x_BDhw.square().sum(dim=1, keepdim=True) + NORM_EPS))
        return found


def _convolution(path: Path, weights: Mapping[str, Tensor], number: int) -> nn.Conv2d:
    name = f"features.{number}"
    missing = [entry for entry in (f"{name}.weight", f"{name}.bias") if entry not in weights]
    if missing:
        raise TokenizerError(
            f"perceptual backbone {path}: it lacks {missing[0]} (first names: {sorted(weights)[:3]}). Give a file of"
            f" {LAYOUT}."
        )
    weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or bias.shape != weight.shape[:1]:
        raise TokenizerError(
            f"perceptual backbone {path}: {name} has shapes {list(weight.shape)} and {list(bias.shape)}, expected"
            f" [out, in, 3, 3] and [out]. Give a file of {LAYOUT}."
        )
    _require_finite(path, "perceptual backbone", {f"{name}.weight": weight, f"{name}.bias": bias})
    convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
    convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
    return convolution


def _heads(path: Path, widths: list[int]) -> list[nn.Parameter]:
    weights = read_weights(path, "perceptual heads")
    heads = []
    for stage, width in enumerate(widths):
        name = f"lin{stage}.model.1.weight"
        head = weights.get(name)
        got = "nothing" if head is None else f"shape {list(head.shape)}"
        if head is None or tuple(head.shape) != (1, width, 1, 1):
            raise TokenizerError(
                f"perceptual heads {path}: {name}: got {got}, expected shape [1, {width}, 1, 1] for this backbone. Give"
                " LPIPS's linear heads of VGG-16, or leave loss.perceptual_heads out."
            )
        _require_finite(path, "perceptual heads", {name: head})
        if bool((head < 0).any()):
            raise TokenizerError(f"perceptual heads {path}: {name} has entries below zero: no distance. Copy it again.")
        heads.append(nn.Parameter(head.float()))
    return heads


def _require_finite(path: Path, what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise TokenizerError(f"{what} {path}: {name} holds values that are not finite. Copy it again.")
