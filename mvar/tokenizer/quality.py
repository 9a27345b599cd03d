"""How good a tokenizer is on pictures it did not learn from.

Legend: N pictures, C channels, H = W side in pixels, L tokens of all scales, S scales, V words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BEST_DB = 100.0
"""PSNR of pictures that are the same."""
RANGE = 2.0
"""From -1 to 1."""
SMALLEST_SSIM = 11
"""Side of SSIM's window, in pixels: smaller pictures have none."""


@dataclass(frozen=True)
class Quality:
    """How well held-out pictures survive, and how the codebook is used. Figures of pictures are means over them."""

    images: int
    psnr_db: float
    """Peak signal-to-noise ratio of clamped reconstructions, against the full range [-1, 1]."""
    ssim: float
    """Structural similarity (Wang et al. 2004; window of 11 px, sigma 1.5, borders reflected); NaN below 11 px."""
    l1: float
    """Mean absolute error, range [-1, 1]."""
    psnr_db_per_scale: list[float]
    """Of what the first 1, 2, ... S scales give, on the first pictures."""
    used_share: float
    """Words used at least once by any scale."""
    used_per_scale: list[float]
    """Words used at least once, by scale."""
    perplexity_per_scale: list[float]
    """exp(entropy) of each scale's words: as many equally frequent words would carry as much."""


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in decibels; at most 100."""
    return 10 * math.log10(4 / max(mse, 4e-10))


def psnr_db_N(reconstructed_NCHW: Tensor, images_NCHW: Tensor) -> Tensor:
    """PSNR of each picture (torchmetrics), at most 100 dB."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    # Reduced picture by picture: over a batch it would be the PSNR of the mean error, which depends on the batch.
    ratios = peak_signal_noise_ratio(reconstructed_NCHW, images_NCHW, RANGE, reduction="none", dim=(1, 2, 3))
    return ratios.clamp(max=BEST_DB)


def ssim_N(reconstructed_NCHW: Tensor, images_NCHW: Tensor) -> Tensor:
    """SSIM of each picture (torchmetrics); NaN for pictures smaller than the window."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    if images_NCHW.shape[-1] < SMALLEST_SSIM:
        return images_NCHW.new_full((len(images_NCHW),), math.nan)
    found = structural_similarity_index_measure(reconstructed_NCHW, images_NCHW, reduction="none", data_range=RANGE)
    assert isinstance(found, Tensor)
    return found.view(-1)


class Tally:
    """Sums over pictures that make up a Quality. They add up over parts of the pictures, and over ranks."""

    def __init__(self, num_scales: int, vocab_size: int) -> None:
        self._scales, self._words = num_scales, vocab_size
        self.sums = torch.zeros(5 + num_scales + num_scales * vocab_size, dtype=torch.float64)
        """images, PSNR, SSIM, L1, pictures measured by scale; PSNR by scale; counts by scale and word."""

    def add(self, images_NCHW: Tensor, reconstructed_NCHW: Tensor, counts_SV: Tensor) -> None:
        """Count pictures in [-1, 1] on the CPU; `counts_SV`: how often each scale used each word for them."""
        self.sums[0] += len(images_NCHW)
        self.sums[1] += psnr_db_N(reconstructed_NCHW, images_NCHW).double().sum()
        self.sums[2] += ssim_N(reconstructed_NCHW, images_NCHW).double().sum()
        self.sums[3] += (reconstructed_NCHW - images_NCHW).abs().mean(dim=(1, 2, 3)).double().sum()
        self.sums[5 + self._scales :] += counts_SV.double().flatten()

    def add_scales(self, images_NCHW: Tensor, reconstructed_kNCHW: list[Tensor]) -> None:
        """Count some pictures as the first 1, 2, ... S scales give them."""
        self.sums[4] += len(images_NCHW)
        for scale, reconstructed_NCHW in enumerate(reconstructed_kNCHW):
            self.sums[5 + scale] += psnr_db_N(reconstructed_NCHW, images_NCHW).double().sum()

    def quality(self, sums: Tensor) -> Quality:
        """`sums`: this tally's, or those of several added up."""
        images, psnr, ssim, l1, measured = sums[:5].tolist()
        counts_SV = sums[5 + self._scales :].view(self._scales, self._words)
        shares_SV = counts_SV / counts_SV.sum(dim=1, keepdim=True)
        entropy_S = -torch.xlogy(shares_SV, shares_SV).sum(dim=1)
        return Quality(
            images=int(images),
            psnr_db=psnr / images,
            ssim=ssim / images,
            l1=l1 / images,
            psnr_db_per_scale=(sums[5 : 5 + self._scales] / measured).tolist(),
            used_share=(counts_SV.sum(dim=0) > 0).sum().item() / self._words,
            used_per_scale=(counts_SV > 0).sum(dim=1).tolist(),
            perplexity_per_scale=entropy_S.exp().tolist(),
        )
