"""Small TorchScript files that stand in for Inception, where features are needed and not their meaning."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallExtractor(nn.Module):
    """Random projections of a picture that was averaged down to `side` pixels; classes as StyleGAN's Inception has."""

    def __init__(self, width: int, classes: int, side: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.side = side
        self.project = nn.Parameter(
            torch.randn(3 * side * side, width, generator=generator) / side, requires_grad=False
        )
        self.head = nn.Parameter(torch.randn(width, classes, generator=generator) / width**0.5, requires_grad=False)

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        small = F.adaptive_avg_pool2d(images.float() / 128 - 1, (self.side, self.side)).flatten(1)
        features = torch.relu(small @ self.project)
        if return_features:
            return features
        return (features @ self.head + (0.0 if no_output_bias else 1.0)).softmax(dim=1)


def write_extractor(path: Path, width: int = 32, classes: int = 8, side: int = 4, seed: int = 0) -> Path:
    """Write one; equal arguments give equal features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.script(SmallExtractor(width, classes, side, seed)).save(str(path))
    return path
