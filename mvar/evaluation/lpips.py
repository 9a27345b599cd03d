"""LPIPS (Zhang et al. 2018) from the TorchScript VGG16 that StyleGAN publishes: module(pictures, return_lpips=True)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvar.errors import MvarError
from mvar.files.disk import sha256_of
from mvar.images.arrays import Bytes


class Lpips:
    """Perceptual distance of pairs of pictures. Raises MvarError where the file is not what it should be."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        if not path.is_file():
            raise MvarError(
                f"--lpips {path}: no such file. Give StyleGAN's vgg16.pt (docs/evaluate.md), or leave it out."
            )
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device).eval()
        except Exception as error:
            raise MvarError(
                f"--lpips {path}: no TorchScript file, or a damaged one ({error}). Copy it again."
            ) from None
        self.sha256 = sha256_of(path)

    @torch.no_grad()
    def __call__(self, first_BHWC: Bytes, second_BHWC: Bytes) -> Tensor:
        """(B,) float64; uint8 pictures (B, H, W, 3)."""
        pairs = (torch.from_numpy(pictures).permute(0, 3, 1, 2) for pictures in (first_BHWC, second_BHWC))
        try:
            a_BF, b_BF = (
                self._module(pictures.to(self._device), resize_images=False, return_lpips=True) for pictures in pairs
            )
            distances_B: Tensor = (a_BF - b_BF).double().square().flatten(1).sum(dim=1).cpu()
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise MvarError(
                f"--lpips {self._path}: its module does not take these pictures ({last}). Give StyleGAN's vgg16.pt, "
                "which needs pictures of 16 px or more, or leave it out."
            ) from None
        return distances_B
